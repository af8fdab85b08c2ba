"""Searches by k2, on GPUs: graphs for CTC models, and fast beam search for transducers.

k2 is optional (the extra `k2`); what is used of it is in its Python reference, and icefall's `decode.py` and
`beam_search.py` show it in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harken.decode.graph import Graph, GraphOptions, Search
from harken.decode.transducer import Networks
from harken.nn.transducer.k2_lattice import load_k2


def k2_graph_search(graph: Graph, options: GraphOptions) -> Search:
    """Return what `graph_search` returns, by k2's pruned intersection for all utterances of a batch at once.

    Raises HarkenError when k2 does not import.
    """
    k2 = load_k2("--backend k2", "--backend kaldi")
    made: dict[torch.device, Any] = {}

    def search(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
        device = log_probs.device
        if device not in made:
            made[device] = _to_k2(k2, graph).to(device)
        order = lengths.argsort(descending=True, stable=True)
        segments = torch.stack([order, torch.zeros_like(order), lengths[order]], dim=1).to("cpu", torch.int32)
        dense = k2.DenseFsaVec(log_probs.float() * options.acoustic_scale, segments)
        lattice = k2.intersect_dense_pruned(
            made[device],
            dense,
            search_beam=options.beam,
            output_beam=options.beam / 2,
            min_active_states=30,
            max_active_states=options.max_active,
        )
        found = _labels_of(k2, k2.shortest_path(lattice, use_double_scores=True))
        places = order.argsort().tolist()
        return [found[place] for place in places]

    return search


def _to_k2(k2: Any, graph: Graph) -> Any:
    """Return a graph with k2's labels: 0 is the blank, which Kaldi's 1 is, and there are no epsilons."""
    fsa = k2.Fsa.from_openfst(graph.fst.to_str(), acceptor=False)
    fsa = k2.connect(k2.remove_epsilon(fsa))
    fsa.labels = torch.where(fsa.labels > 0, fsa.labels - 1, fsa.labels)
    return k2.create_fsa_vec([k2.arc_sort(fsa)])


@dataclass(frozen=True, kw_only=True)
class FastBeamOptions:
    """Limits of fast beam search. Source: the defaults of icefall's `zipformer/decode.py`, with its option after each.

    beam: nats by which a path may be worse than the best (beam). max_contexts, max_states: of an utterance at a frame
    (max-contexts, max-states).
    """

    beam: float = 20.0
    max_contexts: int = 8
    max_states: int = 64


def fast_beam_search(networks: Networks, options: FastBeamOptions) -> Search:
    """Return a search of a transducer: (frames (B, T, J) projected for the joiner, lengths (B,)) -> B lists of ids.

    All utterances are searched as one lattice; a token is followed by another in one frame at most once. Raises
    HarkenError when k2 does not import.
    """
    k2 = load_k2("--method fast_beam", "--method modified_beam")
    classes = networks.joiner.output.out_features
    settings = k2.RnntDecodingConfig(
        vocab_size=classes,
        decoder_history_len=networks.predictor.context,
        beam=options.beam,
        max_contexts=options.max_contexts,
        max_states=options.max_states,
    )

    def search(frames: Tensor, lengths: Tensor) -> list[list[int]]:
        graph = k2.trivial_graph(classes - 1, device=frames.device)
        streams = k2.RnntDecodingStreams([k2.RnntDecodingStream(graph) for _ in frames], settings)
        for place in range(frames.shape[1]):
            shape, contexts = streams.get_contexts()
            predicted = networks.predict(contexts.long())
            rows = frames[shape.row_ids(1).long(), place]
            streams.advance(networks.joiner(rows, predicted).float().log_softmax(-1))
        streams.terminate_and_flush_to_streams()
        lattice = streams.format_output(lengths.tolist())
        return _labels_of(k2, k2.shortest_path(lattice, use_double_scores=True))

    return search


def _labels_of(k2: Any, paths: Any) -> list[list[int]]:
    """Return the output labels above 0 along each of linear paths; removed epsilons leave several on an arc."""
    labels = paths.aux_labels
    if isinstance(labels, k2.RaggedTensor):
        shape = paths.arcs.shape().compose(labels.remove_values_leq(0).shape)
        ragged = k2.RaggedTensor(shape.remove_axis(1).remove_axis(1), labels.remove_values_leq(0).values)
    else:
        ragged = k2.RaggedTensor(paths.arcs.shape().remove_axis(1), labels).remove_values_leq(0)
    found: list[list[int]] = ragged.tolist()
    return found
