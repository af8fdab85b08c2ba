"""`harken decode`: audio to text with a CTC model or a transducer."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harken.apps.graph import add_source_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from harken.core.pieces import Piece
    from harken.data.loader import EvalLoader
    from harken.decode.graph import Search
    from harken.decode.search import DecodeConfig
    from harken.evaluate.hypotheses import Utterance
    from harken.objectives.base import Objective
    from harken.objectives.transcripts import Recogniser

HELP = "Decode manifests with a CTC model or a transducer, in batches, into files for `harken score`."
EXAMPLE = (
    "harken decode exp/finetune test.jsonl --out exp/decode\n"
    "  harken decode exp/finetune test.jsonl --out exp/beam --method prefix_beam --ngram lm.arpa --ngram-weight 0.6\n"
    "  harken decode exp/finetune test.jsonl --out exp/graph --method graph --lexicon lexicon.txt --arpa words.arpa\n"
    "  harken decode exp/transducer test.jsonl --out exp/decode --method modified_beam --beam 4"
)

CHUNK_BATCHES = 8
"""Batches whose texts are kept together when decoding in pieces."""
SEARCH_OPTIONS = (
    *("method", "beam", "ngram", "ngram_weight", "insertion_bonus", "max_seconds"),
    *("graph", "lexicon", "arpa", "graph_beam", "max_active", "acoustic_scale", "backend"),
)
"""Arguments that hypotheses depend on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="experiment, checkpoint or averaged model, `ctc` or `transducer`"
    )
    parser.add_argument(
        "manifest",
        nargs="+",
        type=Path,
        metavar="MANIFEST",
        help="indexed manifests, no two of one name; each gives DIR/<its name>.jsonl",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the hypothesis files")
    parser.add_argument(
        "--method",
        choices=("greedy", "prefix_beam", "graph", "modified_beam", "fast_beam"),
        default="greedy",
        help="search (default: greedy); prefix_beam, graph: for `ctc`; modified_beam, fast_beam: for `transducer`",
    )
    parser.add_argument("--beam", type=int, default=16, metavar="N", help="hypotheses kept (default: 16)")
    parser.add_argument(
        "--ngram",
        metavar="ARPA",
        help="model over the tokens, for both beams; `harken ngram` makes one (default: none)",
    )
    parser.add_argument(
        "--ngram-weight",
        type=float,
        default=0.5,
        metavar="W",
        help="factor on the n-gram's log-probability (default: 0.5)",
    )
    parser.add_argument(
        "--insertion-bonus", type=float, default=0.0, metavar="B", help="added for each token, in nats (default: 0)"
    )
    graph = parser.add_argument_group("of --method graph", "a word n-gram, in place of --ngram, --beam and the bonus")
    graph.add_argument("--graph", type=Path, metavar="DIR", help="what `harken graph` wrote; or make one now, by:")
    add_source_arguments(graph)
    graph.add_argument(
        "--graph-beam", type=float, default=16.0, metavar="N", help="nats below the best that are kept (default: 16)"
    )
    graph.add_argument("--max-active", type=int, default=7000, metavar="N", help="states of a frame (default: 7000)")
    graph.add_argument(
        "--acoustic-scale", type=float, default=1.0, metavar="W", help="factor on the model's scores (default: 1)"
    )
    graph.add_argument(
        "--backend",
        choices=("auto", "kaldi", "k2"),
        default="auto",
        help="what searches a graph (default: auto, k2 on a GPU where it imports, else kaldi)",
    )
    parser.add_argument(
        "--max-seconds", type=float, default=120.0, metavar="S", help="padded audio of a batch (default: 120)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="loader processes (default: 1)")
    parser.add_argument(
        "--piece",
        metavar="I/N",
        help="decode the I-th of N pieces and keep it; the same command without this puts all pieces together",
    )


def run(args: argparse.Namespace) -> int:
    """Decode every manifest.

    Raises HarkenError, before any is decoded, when an output would take the place of another or of a manifest.
    """
    from harken.config.saved import find_model, weights_digest
    from harken.core.distributed import device
    from harken.core.errors import HarkenError
    from harken.core.files import remove
    from harken.core.pieces import Piece
    from harken.evaluate.hypotheses import write_hypotheses
    from harken.objectives.saved import load_objective
    from harken.objectives.transcripts import Recogniser

    outputs = output_files(args.manifest, args.out)
    if args.workers < 0:
        raise HarkenError(f"`--workers` must be 0 (read in this process) or more, got {args.workers}")
    piece = Piece.parse(args.piece) if args.piece else None
    model, config = load_objective(args.model)
    if not isinstance(model, Recogniser):
        raise HarkenError(
            f"{args.model} has objective `{config.objective.name}`; decoding needs a model fine-tuned with `ctc` or "
            "`transducer`"
        )
    model.to(device())
    search, text_of = graph_search_of(model, args) if args.method == "graph" else token_search_of(model, args)
    options = {name: str(getattr(args, name)) for name in SEARCH_OPTIONS}
    plan = {**options, "weights": weights_digest(find_model(args.model))}
    for manifest, out in outputs.items():
        started = time.perf_counter()
        work = Decoding(model, manifest, search, text_of, args.max_seconds, args.workers)
        texts = work.texts(out.with_suffix(".pieces"), plan, piece)
        if texts is None:
            print(f"piece {piece} of {out} is done")
            continue
        utterances = work.utterances(texts)
        write_hypotheses(out, utterances)
        remove(out.with_suffix(".pieces"))
        seconds, spent = sum(utterance.seconds for utterance in utterances), time.perf_counter() - started
        print(
            f"{out}: {len(utterances)} utterances, {seconds / 60:.1f} min of audio in {spent:.1f} s, "
            f"{seconds / spent:.0f} x real time"
        )
    return 0


def token_search_of(model: Recogniser, args: argparse.Namespace) -> tuple[Search, Callable[[list[int]], str]]:
    """Return the search that the arguments ask for, and what turns its token ids into text."""
    from harken.data.tokens import load_tokenizer
    from harken.decode.search import DecodeConfig

    beams = args.method in ("prefix_beam", "modified_beam")
    options = DecodeConfig(
        method=args.method,
        beam=args.beam,
        ngram=args.ngram,
        ngram_weight=args.ngram_weight if beams else 0.5,
        insertion_bonus=args.insertion_bonus,
        token_min_log_prob=-8.0 if args.method == "prefix_beam" else None,
    )
    return search_of(model, options), load_tokenizer(model.config.tokenizer).decode


def graph_search_of(model: Recogniser, args: argparse.Namespace) -> tuple[Search, Callable[[list[int]], str]]:
    """Return the search through the graph that the arguments name, and what turns its word numbers into text.

    Raises HarkenError for a model that is no CTC model and for a graph of another tokenizer.
    """
    from harken.apps.graph import make_graph
    from harken.core.distributed import device
    from harken.core.errors import HarkenError
    from harken.core.files import sha256_file
    from harken.decode.graph import Graph, GraphOptions, graph_search
    from harken.decode.k2_search import k2_graph_search
    from harken.decode.search import checked
    from harken.nn.transducer.k2_lattice import k2_serves_gpus
    from harken.objectives.ctc import Ctc

    if not isinstance(model, Ctc):
        raise HarkenError("`--method graph` is for `ctc` models, and this is a transducer; modified_beam is for those")
    if args.ngram is not None or args.insertion_bonus:
        raise HarkenError(
            "`--ngram` and `--insertion-bonus` have no effect with `--method graph`: --arpa is its n-gram"
        )
    if args.graph is not None and (args.lexicon or args.arpa):
        raise HarkenError("`--graph` is a graph that was made before, `--lexicon` and `--arpa` make one: name either")
    tokenizer = model.config.tokenizer
    graph = make_graph(tokenizer, args.lexicon, args.arpa) if args.graph is None else Graph.load(args.graph)
    if graph.card["tokenizer"] != sha256_file(tokenizer):
        raise HarkenError(f"{args.graph} is of another tokenizer than {tokenizer}: `harken graph --tokens {tokenizer}`")
    options = GraphOptions(beam=args.graph_beam, max_active=args.max_active, acoustic_scale=args.acoustic_scale)
    by_k2 = args.backend == "k2" or (args.backend == "auto" and device().type == "cuda" and k2_serves_gpus())
    found = (k2_graph_search if by_k2 else graph_search)(graph, options)

    def search(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
        return found(checked(log_probs, lengths, graph.card["classes"]), lengths)

    return search, lambda numbers: " ".join(graph.words[number - 1] for number in numbers)


def search_of(model: Objective, options: DecodeConfig) -> Search:
    """Return the search of a recogniser, which reads its `search_input`.

    Raises HarkenError for a search of another kind of model, and as `make_search` does.
    """
    from harken.core.errors import HarkenError
    from harken.data.tokens import BLANK, load_tokenizer
    from harken.decode.search import make_search, make_transducer_search
    from harken.decode.transducer import Networks
    from harken.objectives.ctc import Ctc
    from harken.objectives.transducer import Transducer

    if isinstance(model, Transducer):
        networks = Networks(model.predictor, model.joiner)
        return make_transducer_search(options, networks, load_tokenizer(model.config.tokenizer).symbols())
    if isinstance(model, Ctc):
        symbols = load_tokenizer(model.config.tokenizer).symbols()
        return make_search(options, len(symbols), BLANK, symbols)
    raise HarkenError(f"no search is known for the model {type(model).__name__}: it must be a Ctc or a Transducer")


def output_files(manifests: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Return the hypothesis file of each manifest: one of its name in `folder`.

    Raises HarkenError when there is no such manifest, when two have one name, and when a file would be a manifest.
    """
    from harken.core.errors import HarkenError

    outputs: dict[Path, Path] = {}
    for manifest in manifests:
        out = folder / f"{manifest.stem}.jsonl"
        if not manifest.is_file():
            raise HarkenError(f"no manifest at {manifest}; `harken data scan` makes one from audio files")
        if out in outputs.values():
            other = next(known for known, taken in outputs.items() if taken == out)
            raise HarkenError(
                f"{other} and {manifest} would both be decoded into {out}: decode them into different folders (--out)"
            )
        if any(out.resolve() == known.resolve() for known in manifests):
            raise HarkenError(
                f"{out} is a manifest, and the hypotheses would replace it: choose another folder (--out)"
            )
        outputs[manifest] = out
    return outputs


@dataclass(frozen=True)
class Decoding:
    """The decoding of one manifest.

    text_of: of what the search finds. max_seconds: padded audio of a batch. workers: processes of the loader.
    """

    model: Recogniser
    manifest: Path
    search: Search
    text_of: Callable[[list[int]], str]
    max_seconds: float
    workers: int

    def texts(self, folder: Path, plan: Mapping[str, Any], piece: Piece | None) -> dict[str, str] | None:
        """Return the hypothesis of each cut by id, with those that pieces left in `folder`; None after a piece.

        plan: what the hypotheses depend on, besides the manifest. Raises HarkenError when the pieces are of another.
        """
        from harken.core.pieces import Pieces
        from harken.data.manifest import Manifest

        if piece is None and not folder.is_dir():
            return self._part(0, 1)
        # the same batches, dealt out as to the ranks of a validation
        chunks = max(1, -(-len(self._loader(0, 1)) // CHUNK_BATCHES))
        pieces = Pieces(folder, {**plan, "manifest": Manifest(self.manifest).card["sha256"]}, chunks)
        if piece is not None:
            pieces.work(piece, lambda chunk: self._part(chunk, chunks))
            return None
        found: dict[str, str] = {}
        for part in pieces.results(lambda chunk: self._part(chunk, chunks)):
            found.update(part)
        return found

    def _loader(self, part: int, parts: int) -> EvalLoader:
        from harken.config.schema import DataConfig
        from harken.data.dataset import as_it_is
        from harken.data.loader import EvalLoader

        rate = self.model.backbone.spec.sample_rate
        data = DataConfig(train=str(self.manifest), sample_rate=rate, workers=self.workers)
        return EvalLoader(str(self.manifest), data, self.max_seconds, as_it_is, rank=part, world_size=parts)

    def _part(self, part: int, parts: int) -> dict[str, str]:
        import torch

        from harken.core.distributed import device

        texts: dict[str, str] = {}
        with torch.inference_mode():
            for batch, counts in self._loader(part, parts):
                if not counts:  # the last batch again, for a part that has one fewer
                    continue
                for note in batch.notes:
                    print(f"NOTE {note.kind}: {note.reason}")
                found = self.search(*self.model.search_input(batch.to(device())))
                for cut, tokens in zip(batch.ids, found, strict=True):
                    texts[cut] = " ".join(self.text_of(tokens).split())
        return texts

    def utterances(self, texts: Mapping[str, str]) -> list[Utterance]:
        """Return the utterances of the manifest with their hypotheses, in the manifest's order."""
        from harken.data.manifest import Manifest
        from harken.evaluate.hypotheses import Utterance

        rows = []
        for cut in Manifest(self.manifest):
            speaker = next((part.speaker for part in cut.supervisions if part.speaker), "?")
            reference = " ".join(part.text for part in cut.supervisions if part.text)
            rows.append(
                Utterance(id=cut.id, speaker=speaker, ref=reference, hyp=texts.get(cut.id, ""), seconds=cut.duration)
            )
        return rows
