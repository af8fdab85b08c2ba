"""`harken data`: manifests from audio, their index, their faults, their statistics, and tokenizers from their texts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harken.apps.subverbs import add_sub_verb

HELP = "scan, index, verify and describe manifests; make tokenizers, rooms and shards"
EXAMPLE = "harken data scan corpus/wav --out data/all.jsonl\n  harken data scan --help"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-verbs and their options."""
    verbs = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _scan_arguments(_sub(verbs, "scan", "harken data scan corpus/wav --text corpus/text --out data/all.jsonl"))
    index = _sub(verbs, "index", "harken data index data/train.jsonl data/dev.jsonl")
    index.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST", help="Lhotse cuts as plain JSONL")
    _jobs(index)
    _check_arguments(_sub(verbs, "check", "harken data check conf/pretrain.yaml data.train=data/train.jsonl --full"))
    _verify_arguments(_sub(verbs, "verify", "harken data verify data/all.jsonl --clean data/clean.jsonl"))
    _stats_arguments(_sub(verbs, "stats", "harken data stats data/train.jsonl --max-seconds 87.5"))
    _tokens_arguments(_sub(verbs, "tokens", "harken data tokens data/train.jsonl --out data/bpe.model --size 500"))
    _rooms_arguments(_sub(verbs, "rooms", "harken data rooms --out data/rooms.jsonl --count 1000"))
    _shards_arguments(_sub(verbs, "shards", "harken data shards data/train.jsonl --out data/shar --shuffle 1"))


ACTIONS = {
    "scan": "write an indexed manifest of a folder of audio, a TSV, a JSONL, a Kaldi directory or a Lhotse manifest",
    "index": "write the index of manifests that were made or edited by other means",
    "check": "look whether manifests, labels and texts fit a configuration, as `harken train` does before step 0",
    "verify": "decode every cut and list the bad ones; exit status 1 when there are any",
    "stats": "durations, speakers, texts, and how the sampling plan fills its batches",
    "tokens": "make a tokenizer from the texts of manifests: a list of characters, or BPE of characters or bytes",
    "rooms": "simulate rooms: impulse responses for `data.reverberation`, by pyroomacoustics",
    "shards": "convert between indexed manifests, Lhotse Shar and WebDataset, audio in its own coding",
}


def _sub(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, example: str
) -> argparse.ArgumentParser:
    return add_sub_verb(verbs, name, ACTIONS[name], example)


def _scan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder (wav, flac, mp3, ogg, opus; with folders below), a Kaldi directory, "
        "a .tsv (fairseq's, or with a header), a .jsonl (NeMo's keys, or Lhotse cuts or recordings)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="MANIFEST.jsonl", help="the manifest to write")
    parser.add_argument(
        "--text",
        metavar="FILE|.SUFFIX",
        help="texts: a file of `ID TEXT` lines, fairseq's .wrd or .ltr, or the suffix of files beside the audio (.txt)",
    )
    parser.add_argument("--supervisions", type=Path, metavar="FILE", help="Lhotse supervisions of Lhotse recordings")
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder that relative audio paths start from")
    parser.add_argument(
        "--channels",
        choices=("first", "each"),
        default="first",
        help="of files with several channels (default: first)",
    )
    _piece(parser)
    _jobs(parser)


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="+", help="YAML files or presets, merged left to right, then key=value overrides"
    )
    parser.add_argument("--full", action="store_true", help="look at every cut, not at a seeded sample of 256")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="an indexed manifest")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.tsv", help="list of the bad cuts (default: MANIFEST.verify.tsv)"
    )
    parser.add_argument("--clean", type=Path, metavar="OUT.jsonl", help="write the manifest without the bad cuts here")
    parser.add_argument(
        "--sample-rate",
        type=int,
        default=16000,
        metavar="HZ",
        help="of training; others are noted (default: 16000)",
    )
    parser.add_argument(
        "--max-clipped",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="of samples at full scale (default: 0.01)",
    )
    _piece(parser)
    _jobs(parser)


def _piece(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--piece",
        metavar="I/N",
        help="do the I-th of N pieces and keep it; the same command without this puts all pieces together",
    )


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST", help="indexed manifests")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the numbers here, too")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="padded audio of a batch in the plan (default: 60)",
    )
    parser.add_argument("--parts", type=int, default=2, metavar="N", help="rectangles of a batch (default: 2)")


def _tokens_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST", help="manifests with texts")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="FILE.model for BPE, else characters")
    parser.add_argument("--kind", choices=("characters", "bpe", "byte-bpe"), help="(default: as --out says)")
    parser.add_argument("--size", type=int, metavar="N", help="classes of BPE, the blank included (default: 500)")


def _rooms_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="NAME.jsonl",
        help="the manifest to write; the responses go to NAME.audio/",
    )
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="rooms (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of all that is drawn (default: 1)")
    parser.add_argument("--sample-rate", type=int, default=16000, metavar="HZ", help="(default: 16000)")
    _jobs(parser)


def _shards_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a manifest, or a stream: a folder of shards, tars by brace expansion, URLs, `pipe:COMMAND`, a list .txt",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR|NAME.jsonl",
        help="folder of the shards, or the manifest, whose audio goes to NAME.audio/",
    )
    parser.add_argument(
        "--to",
        choices=("shar", "webdataset", "manifest"),
        help="(default: manifest when --out ends in .jsonl, else shar)",
    )
    parser.add_argument("--shard-cuts", type=int, metavar="N", help="cuts of a shard at most (default: 1000)")
    parser.add_argument("--shard-megabytes", type=float, metavar="MB", help="audio of a shard at most")
    parser.add_argument(
        "--shuffle", type=int, metavar="SEED", help="mix the cuts of a manifest among the shards; streams mix less"
    )
    _jobs(parser)


def _jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes (default: one a core; one in all for a few files)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the sub-verb."""
    actions = {
        "scan": run_scan,
        "index": run_index,
        "check": run_check,
        "verify": run_verify,
        "stats": run_stats,
        "tokens": run_tokens,
        "rooms": run_rooms,
        "shards": run_shards,
    }
    return actions[args.action](args)


def run_scan(args: argparse.Namespace) -> int:
    """Write the manifest; what could not be read is named and does not fail the scan."""
    from harken.core.pieces import Piece
    from harken.data.scan import scan
    from harken.data.stats import length

    result = scan(
        args.source,
        args.out,
        jobs=args.jobs,
        text=args.text,
        supervisions=args.supervisions,
        root=args.root,
        each_channel=args.channels == "each",
        piece=Piece.parse(args.piece) if args.piece else None,
    )
    if result is None:
        return 0
    for note in result.notes:
        print(f"  {note}")
    if result.refused:
        print(f"  {len(result.refused)} utterances were left out, all listed in {result.quarantine}:")
        for name, path, reason in result.refused[:5]:
            print(f"    {name} [{path}]: {reason}")
    print(f"{args.out}: {result.cuts} cuts, {length(result.seconds)}, from {args.source} ({result.kind})")
    return 0


def run_index(args: argparse.Namespace) -> int:
    """Index manifests."""
    from harken.data.index import build_index
    from harken.data.manifest import Manifest
    from harken.data.stats import length

    for path in args.manifests:
        count = build_index(path, jobs=args.jobs)
        print(f"{path}: {count} cuts, {length(3600 * Manifest(path).card['hours'])}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Check the data of a configuration; status 1 when a run with it would be refused."""
    from harken.apps.train import split_arguments
    from harken.config.load import load
    from harken.data.check import check_data
    from harken.objectives.saved import preparers

    config = load(*split_arguments(args.config)).config
    prepare, _ = preparers(config)
    checked = check_data(config, prepare, full=args.full)
    for level in ("note", "warning", "wrong"):
        for text in checked.texts(level):
            print(f"{level.upper() if level == 'wrong' else level} {text}")
    print(f"looked at {'; '.join(checked.done)}: {len(checked.texts('wrong')) or 'nothing'} wrong")
    return 1 if checked.refusal() else 0


def run_verify(args: argparse.Namespace) -> int:
    """Decode every cut; status 1 when there are problems."""
    from harken.core.pieces import Piece
    from harken.data.verify import check_clean, verify, write_clean, write_list

    if args.clean is not None:
        check_clean(args.manifest, args.clean)
    result = verify(
        args.manifest,
        jobs=args.jobs,
        sample_rate=args.sample_rate,
        max_clipped=args.max_clipped,
        piece=Piece.parse(args.piece) if args.piece else None,
    )
    if args.piece:
        return 0
    print(result.table())
    out = args.out or args.manifest.with_name(args.manifest.name + ".verify.tsv")
    write_list(result, out)
    print(f"list of the bad cuts: {out}")
    if args.clean is not None:
        write_clean(result, args.clean)
        print(f"{args.clean}: the {len(result.sound)} sound cuts")
    return 1 if result.bad else 0


def run_stats(args: argparse.Namespace) -> int:
    """Print the statistics of each manifest."""
    from harken.core.errors import HarkenError
    from harken.core.files import write_json_atomic
    from harken.data.manifest import Manifest
    from harken.data.stats import describe, render

    if args.max_seconds <= 0 or args.parts < 1:
        raise HarkenError(f"--max-seconds and --parts must be positive, got {args.max_seconds:g} and {args.parts}")
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    found = []
    for path in args.manifests:
        stats = describe(Manifest(path), max_seconds=args.max_seconds, parts=args.parts)
        found.append(stats.to_json())
        print(render(stats, unicode=unicode) + "\n")
    if args.out is not None:
        write_json_atomic(args.out, found)
        print(f"numbers: {args.out}")
    return 0


def run_tokens(args: argparse.Namespace) -> int:
    """Make a tokenizer and say what is in it."""
    from harken.core.errors import HarkenError
    from harken.data.lines import text_of
    from harken.data.manifest import Manifest
    from harken.data.tokens import BytePieces, Characters, Pieces

    by_name = "bpe" if args.out.suffix == ".model" else "characters"
    if (args.kind or by_name).removeprefix("byte-") != by_name:
        raise HarkenError(
            f"--out must end in .model for BPE and otherwise for characters, got {args.out} and --kind {args.kind}"
        )
    if args.size is not None and by_name == "characters":
        raise HarkenError("--size is of BPE; the texts decide how many characters there are")
    manifests = [Manifest(path) for path in args.manifests]
    texts = [text for item in manifests for place in range(len(item)) if (text := text_of(item.line(place)))]
    if not texts:
        raise HarkenError(f"no cut of {', '.join(map(str, args.manifests))} has a text")
    if by_name == "bpe":
        kind = BytePieces if args.kind == "byte-bpe" else Pieces
        size = kind.train(texts, args.out, args.size or 500).size
        print(f"{args.out}: {size} classes, the blank included, from {len(texts)} texts")
        return 0
    tokenizer = Characters.train(texts)
    tokenizer.save(args.out)
    symbols = " ".join(tokenizer.symbols()[1:])
    print(f"{args.out}: {tokenizer.size} classes, the blank included, from {len(texts)} texts: {symbols}")
    return 0


def run_rooms(args: argparse.Namespace) -> int:
    """Simulate rooms."""
    from harken.data.rooms import simulate

    seconds = simulate(args.out, args.count, seed=args.seed, sample_rate=args.sample_rate, jobs=args.jobs)
    print(f"{args.out}: {args.count} rooms, impulse responses of {seconds:.2f} s on average")
    return 0


def run_shards(args: argparse.Namespace) -> int:
    """Convert, and say what came of it."""
    from harken.data.stats import length
    from harken.data.streams.convert import convert

    result = convert(
        args.source,
        args.out,
        args.to or ("manifest" if args.out.suffix == ".jsonl" else "shar"),
        shard_cuts=args.shard_cuts,
        shard_megabytes=args.shard_megabytes,
        shuffle=args.shuffle,
        jobs=args.jobs,
    )
    if result.resumed:
        print(f"  {result.resumed} shards were there already, from an earlier, interrupted run")
    print(
        f"{args.out}: {result.cuts} cuts, {length(result.seconds)}, in {result.shards} shards, read again and compared"
    )
    return 0
