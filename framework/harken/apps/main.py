"""`harken VERB ...`: finds the verb's file and runs it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from harken import __version__
from harken.core.errors import HarkenError

# one line a verb here, so that `harken --help` imports none of them
VERBS = {
    "train": "pretrain, fine-tune or distil: the configuration decides",
    "bench": "measure what limits a run, reading or computing",
    "tune-batch": "measure which micro-batches fit in this device's memory",
    "config": "print a resolved configuration and where each value came from",
    "data": "scan, index, verify and describe manifests; make tokenizers",
    "units": "fit clusterers, label audio, check and compare labels",
    "features": "write hidden states of a model's layers for numpy and Lhotse",
    "decode": "turn audio into text with a CTC model or a transducer",
    "align": "place transcripts in time with a CTC model",
    "probe": "judge representations by their rank and by an alignment",
    "ngram": "estimate a character or token language model for decoding",
    "graph": "compose a lexicon and a word n-gram for decoding CTC models",
    "score": "word and character error rates of a hypothesis file",
    "average": "average the weights of checkpoints",
    "import": "read another toolkit's checkpoint into a harken model",
    "plan": "compute how long a run takes and what it stores",
    "launch": "run a command as a job of a Slurm cluster",
    "status": "show the stages and jobs of an experiment and how far they are",
    "job": "what a job runs: has a command save when Slurm warns, requeues it",
    "parallel": "run a verb over the nodes of a job, a process each GPU",
    "preflight": "check that the nodes of a job can train together",
    "compare": "tell whether a run follows a reference",
    "alarms": "tell which alarms a run's records ring, with other limits too",
    "report": "write one HTML page about an experiment",
    "doctor": "versions, devices, what is missing and how to install it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; a HarkenError is printed without a traceback and gives exit status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # the deepspeed launcher puts this before the verb; the rank is in the environment as well
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    parser = argparse.ArgumentParser(
        prog="harken",
        description="Pretrain and fine-tune speech and audio encoders.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n"
        + "\n".join(f"  {name:12}{text}" for name, text in VERBS.items())
        + "\n\nexample:\n  harken train hubert_base --exp exp/base data.train=train.jsonl",
    )
    parser.add_argument("--version", action="version", version=f"harken {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="what to do; `harken VERB --help` tells more")
    if not arguments:
        parser.print_help()
        return 0
    verb = parser.parse_args(arguments[:1]).verb
    return _run(verb, arguments[1:])


def module_of(verb: str) -> str:
    """Return the full name of a verb's module."""
    return "harken.apps." + ("import_" if verb == "import" else verb.replace("-", "_"))


def _run(verb: str, arguments: list[str]) -> int:
    module = importlib.import_module(module_of(verb))
    parser = argparse.ArgumentParser(
        prog=f"harken {verb}",
        description=module.HELP,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        args = parser.parse_intermixed_args(arguments)  # key=value may stand before and after options
    except TypeError:  # sub-verbs cannot be intermixed
        args = parser.parse_args(arguments)
    try:
        return int(module.run(args))
    except HarkenError as error:
        print(f"harken {verb}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
