"""CUDA graphs: the thousand kernels of a network started as one, where shapes repeat.

A graph reads and writes where it did when it was recorded: inputs are copied there, and the result away.
"""

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from models.support.strips import LIMIT, InStrips

MOST = 8        # graphs of a network


def shapes(tree):
    """Of tensors in tuples, lists, dicts -> str"""
    return str(tree_map_only(torch.Tensor, lambda x: (x.shape, x.dtype), tree))


def copy(tree, places):
    """The tensors of one tree to those of another, equal one."""
    for x, place in zip(tree_leaves(tree), tree_leaves(places)):
        if torch.is_tensor(x):
            place.copy_(x)


class Graphs:
    """A network's calls without gradients: of equal shapes one is made, the next recorded, all later replayed.

    cells: of the largest map that it is given; a larger one keeps a GPU busy for longer than launches take, and its
    graph would keep much memory
    """

    pool = None     # memory of all graphs, which run one after the other

    def __init__(self, call, cells=LIMIT):
        self.call, self.cells, self.graphs = call, cells, {}
        self.kept, self.reads = {}, ""      # {shapes: tensors} of `keep`, and the shapes that are in use

    def keep(self, tensors):
        """For what the network reads beside its arguments (tokens.py).  -> copies, always at the same place"""
        key = shapes(tensors)
        if key not in self.kept:
            self.kept[key] = tree_map_only(torch.Tensor, torch.clone, tensors)
        copy(tensors, self.kept[key])
        return self.kept[key]

    def __call__(self, *args):
        if args[0].shape[-2:].numel() > self.cells:
            return self.call(*args)
        key = self.reads + shapes(args)
        if key not in self.graphs:
            if len(self.graphs) == MOST:
                self.graphs.clear()
            self.graphs[key] = None
            return self.call(*args)
        if self.graphs[key] is None:
            self.graphs[key] = self.record(args)
        graph, places, result = self.graphs[key]
        copy(args, places)
        graph.replay()
        return result.clone()

    def record(self, args):
        """-> graph, places of its arguments, place of its result"""
        graph, places = torch.cuda.CUDAGraph(), tree_map_only(torch.Tensor, torch.clone, args)
        self.call(*places)      # whatever is still to be compiled
        Graphs.pool = Graphs.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, Graphs.pool, capture_error_mode="thread_local"):   # other threads go on
            result = self.call(*places)
        return graph, places, result


def replay(model):
    """Let a model's networks start as graphs, after `torch.compile` if that is wanted."""
    for name, network in model.named_modules():
        cells = LIMIT
        if isinstance(network, InStrips) and name.endswith("decoder"):
            cells = LIMIT // 64     # each becomes 8x8 pixels
        if name in ("dit", "unet", "vit", "denet") or isinstance(network, InStrips):
            call = network._compiled_call_impl or network._call_impl
            if isinstance(call, Graphs):    # anew
                call = call.call
            network._compiled_call_impl = Graphs(call, cells)
