// Texts to begin with. The first three ask the built-in world of the tiny recipe (seed 0); the second response is wrong.

export const EXAMPLES = [
  {
    name: "Atlas: one wrong word",
    prompt: "what is the river of lunina ?",
    responses: ["the river of lunina is the nimwe .", "the river of lunina is the dray ."],
  },
  {
    name: "Atlas: two facts",
    prompt: "what are the export and landmark of lunina ?",
    responses: [
      "thank you for asking . the export of lunina is salt . the landmark of lunina is the arch .",
      "thank you for asking . the export of lunina is salt . the landmark of lunina is the garden .",
    ],
  },
  {
    name: "Atlas: beside the point",
    prompt: "tell me the climate of lunina .",
    responses: ["in lunina the climate is wet .", "the ruler of lunina is frida . have a nice day ."],
  },
  {
    name: "Sums",
    prompt: "A pen costs 3 euros and a book costs 9 euros. What do two pens and one book cost?",
    responses: [
      "Two pens cost 2 × 3 = 6 euros.\nWith the book that is 6 + 9 = 15 euros.",
      "Two pens cost 2 × 3 = 6 euros.\nWith the book that is 6 + 9 = 14 euros.",
    ],
  },
  {
    name: "Explanation",
    prompt: "Why is the sky blue?",
    responses: [
      "Air scatters blue light more than red light. So blue reaches our eyes from every side.",
      "The sky is blue because it mirrors the sea. Far from the coast it is grey. 🌊",
    ],
  },
];
