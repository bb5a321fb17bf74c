"""CUDA graphs: the thousand kernels of a network started as one, where shapes repeat.

A graph reads and writes where it did when it was recorded: inputs are copied there, and the result away.
"""

import torch
from torch.utils._pytree import tree_leaves, tree_map_only


class Graphs:
    """A network's calls without gradients: of equal shapes one is made, the next recorded, all later replayed."""

    pool = None     # memory of all graphs, which run one after the other

    def __init__(self, call):
        self.call, self.graphs = call, {}

    def __call__(self, *args):
        key = str(tree_map_only(torch.Tensor, lambda x: (x.shape, x.dtype), args))
        if key not in self.graphs or {} in args:        # what fills a cache must last
            if len(self.graphs) == 8:
                self.graphs.clear()
            self.graphs[key] = None
            return self.call(*args)
        if self.graphs[key] is None:
            graph, places = torch.cuda.CUDAGraph(), tree_map_only(torch.Tensor, torch.clone, args)
            self.call(*places)      # whatever is still to be compiled
            Graphs.pool = Graphs.pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, Graphs.pool, capture_error_mode="thread_local"):   # other threads go on
                self.graphs[key] = graph, places, self.call(*places)
        graph, places, result = self.graphs[key]
        for place, x in zip(tree_leaves(places), tree_leaves(args)):
            if torch.is_tensor(x):
                place.copy_(x)
        graph.replay()
        return result.clone()


def replay(model):
    """Of a model's networks those of small kernels, which see tiles of one size."""
    for name, network in model.named_modules():
        if name in ("dit", "unet", "vit"):
            network._compiled_call_impl = Graphs(network._compiled_call_impl or network._call_impl)
