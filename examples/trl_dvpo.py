"""Trains a policy with DVPO inside TRL: one response for each prompt, advantages for every token from a frozen GVM.

    python examples/trl_dvpo.py --policy SFT_DIR --gvm GVM_DIR --prompts prompts.jsonl --out OUT_DIR
    python examples/trl_dvpo.py --policy SFT_DIR --gvm http://127.0.0.1:8000 --prompts prompts.jsonl --out OUT_DIR

The GVM is a checkpoint folder or the URL of a server started with `dvpo serve`. Each line of the prompts' file is a
JSON object whose "prompt" holds chat messages. The defaults suit a model of well under 1M parameters on a CPU.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from dvpo import models
from dvpo.errors import InputError, StageError
from dvpo.integrations.trl import DVPOConfig, DVPOTrainer


class PrintRows(TrainerCallback):
    """One line for each update."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            print(
                f"update {state.global_step}: mean Q {logs['rewards/gvm_score/mean']:.4f}  "
                f"KL {logs.get('kl', 0.0):.4f}  length {logs['completions/mean_length']:.1f}",
                flush=True,
            )


def read_prompts(path: Path) -> Dataset:
    """The prompts of a file of JSON lines. Raises InputError, naming the line, where one is not as it should be."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append({"prompt": [{"role": m["role"], "content": m["content"]} for m in json.loads(line)["prompt"]]})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{path}:{number}: not an object with "prompt": chat messages ({error})') from error
    return Dataset.from_list(rows)


def main(options: argparse.Namespace) -> None:
    """Trains, then saves the policy in `options.out`."""
    tokenizer = models.load_tokenizer(options.policy)
    config = DVPOConfig(
        output_dir=str(options.out),
        per_device_train_batch_size=options.batch,
        max_steps=options.updates,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_completion_length=options.max_new_tokens,
        beta=options.beta,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=options.seed,
    )
    trainer = DVPOTrainer(
        str(options.policy),
        options.gvm,
        tokenizer,
        config,
        estimator=options.estimator,
        train_dataset=read_prompts(options.prompts),
        callbacks=[PrintRows()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    models.save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, options.out)
    print(f"saved the policy in {options.out}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="folder of the policy to start from")
    parser.add_argument("--gvm", required=True, help="folder of the GVM, or URL of a scoring server")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with chat prompts")
    parser.add_argument("--out", type=Path, required=True, help="where to save the trained policy")
    parser.add_argument("--estimator", choices=("q", "gae", "official"), default="q")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="prompts in an update")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.05, help="weight of the KL term")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    disable_progress_bar()
    try:
        main(parse())
    except (InputError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
