"""The stage graphs of the recipes: `atlas` (the built-in world) and `data` (language models on real preferences)."""
