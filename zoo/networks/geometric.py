"""Graph networks of PyTorch Geometric: the usual convolutions, with norms, residuals, pooling and edge features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.network import Builder, Network, Table

NODES, FEATURES, CLASSES, EDGE = 12, 8, 3, 4


def _edges() -> Tensor:
    source = torch.arange(NODES).repeat(3)
    target = (source + torch.tensor([1, 3, 5]).repeat_interleave(NODES)) % NODES
    return torch.cat([torch.stack([source, target]), torch.stack([target, source])], dim=1)


class Nodes(nn.Module):
    """Two convolutions with batch norm and a residual, then a linear layer for every node."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int, residual: bool, edges: bool) -> None:
        super().__init__()
        self.lift, self.first, self.second = nn.Linear(FEATURES, width), first, second
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(2))
        self.head, self.residual, self.edges = nn.Linear(width, CLASSES), residual, edges

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        x = self.lift(x)
        for conv, norm in zip((self.first, self.second), self.norms, strict=True):
            y = conv(x, edge_index, edge_attr) if self.edges else conv(x, edge_index)
            y = norm(y).relu()
            x = x + y if self.residual else y
        return self.head(x)


class Pooled(nn.Module):
    """A network on nodes, pooled to one vector for each graph."""

    def __init__(self, body: nn.Module, pool: str) -> None:
        super().__init__()
        self.body, self.pool, self.head = body, pool, nn.Linear(24, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        from torch_geometric import nn as geometric

        return self.head(getattr(geometric, f"global_{self.pool}_pool")(self.body(x, edge_index), batch))


def _conv(make: Callable[[Any], nn.Module], residual: bool = False, edges: bool = False) -> Builder:
    def build() -> Network:
        import torch_geometric.nn as geometric

        model = Nodes(make(geometric), make(geometric), 24, residual, edges)
        edge_index = _edges()
        return Network(model, (torch.randn(NODES, FEATURES), edge_index, torch.rand(edge_index.shape[1], EDGE)))

    return build


def _mlp(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Linear(a, 32), nn.ReLU(), nn.Linear(32, b))


def _whole(name: str, **options: Any) -> Builder:
    """A model of `torch_geometric.nn` as a user would take it."""

    def build() -> Network:
        import torch_geometric.nn as geometric

        if name == "PNA":
            options.update(aggregators=["mean", "min", "max", "std"], scalers=["identity", "amplification"])
            options["deg"] = torch.tensor([0, 0, 0, 0, 0, 0, NODES])
        model = getattr(geometric, name)(FEATURES, 24, 3, CLASSES, **options)
        return Network(model, (torch.randn(NODES, FEATURES), _edges()))

    return build


class TypedNodes(nn.Module):
    """Two attention layers over nodes and edges of several types; heads times channels are written as a product."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric import nn as geometric

        self.lift, self.head = nn.Linear(FEATURES, 24), nn.Linear(24, CLASSES)
        self.convs = nn.ModuleList(geometric.HEATConv(24, 6, 2, 3, 5, EDGE, 7, heads=4) for _ in range(2))

    def forward(self, x: Tensor, edge_index: Tensor, nodes: Tensor, edges: Tensor, edge_attr: Tensor) -> Tensor:
        x = self.lift(x)
        for conv in self.convs:
            x = conv(x, edge_index, nodes, edges, edge_attr).relu()
        return self.head(x)


def _typed() -> Network:
    edges = _edges()
    count = edges.shape[1]
    types = torch.arange(NODES) % 2, torch.arange(count) % 3
    return Network(TypedNodes(), (torch.randn(NODES, FEATURES), edges, *types, torch.rand(count, EDGE)))


class Dynamic(nn.Module):
    """Each layer attends to what all layers before it gave."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric import nn as geometric

        self.lift, self.head = nn.Linear(FEATURES, 24), nn.Linear(24, CLASSES)
        self.convs = nn.ModuleList(geometric.DNAConv(24, heads=4) for _ in range(3))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        found = self.lift(x).relu().unsqueeze(1)
        for conv in self.convs:
            found = torch.cat([found, conv(found, edge_index).relu().unsqueeze(1)], dim=1)
        return self.head(found[:, -1])


def _dynamic() -> Network:
    return Network(Dynamic(), (torch.randn(NODES, FEATURES), _edges()))


def _polynormer() -> Network:
    from torch_geometric.nn import Polynormer

    model = Polynormer(FEATURES, 24, CLASSES, local_layers=2, global_layers=2)
    model._global = True  # after a warm-up, as its paper trains it
    return Network(model, (torch.randn(NODES, FEATURES), _edges(), torch.arange(2).repeat_interleave(NODES // 2)))


def _pooled(pool: str) -> Builder:
    def build() -> Network:
        import torch_geometric.nn as geometric

        body = geometric.GIN(FEATURES, 24, 2, norm="batch_norm")
        batch = torch.arange(2).repeat_interleave(NODES // 2)
        edges = torch.tensor([[0, 1, 2, 6, 7, 8], [1, 2, 0, 7, 8, 6]])
        return Network(Pooled(body, pool), (torch.randn(NODES, FEATURES), edges, batch))

    return build


def table() -> Table:
    """Every network of the family, by name."""
    return {
        "gcn": _whole("GCN"),
        "gcn_norm": _whole("GCN", norm="batch_norm"),
        "gcn_jump": _whole("GCN", jk="cat"),
        "sage": _whole("GraphSAGE"),
        "sage_max": _whole("GraphSAGE", aggr="max"),
        "gat": _whole("GAT", heads=4),
        "gat_v2": _whole("GAT", heads=4, v2=True),
        "gin": _whole("GIN"),
        "gin_norm": _whole("GIN", norm="layer_norm"),
        "pna": _whole("PNA"),
        "edge_cnn": _whole("EdgeCNN"),
        "gcn_residual": _conv(lambda g: g.GCNConv(24, 24), residual=True),
        "transformer": _conv(lambda g: g.TransformerConv(24, 6, heads=4), residual=True),
        "transformer_beta": _conv(lambda g: g.TransformerConv(24, 6, heads=4, beta=True, edge_dim=EDGE), edges=True),
        "gat_edges": _conv(lambda g: g.GATConv(24, 6, heads=4, edge_dim=EDGE), residual=True, edges=True),
        "gine": _conv(lambda g: g.GINEConv(_mlp(24, 24), edge_dim=EDGE), edges=True),
        "cheb": _conv(lambda g: g.ChebConv(24, 24, 3)),
        "tag": _conv(lambda g: g.TAGConv(24, 24)),
        "sg": _conv(lambda g: g.SGConv(24, 24, K=2)),
        "graph_conv": _conv(lambda g: g.GraphConv(24, 24), residual=True),
        "gated": _conv(lambda g: g.GatedGraphConv(24, 2)),
        "res_gated": _conv(lambda g: g.ResGatedGraphConv(24, 24), residual=True),
        "edge_conv": _conv(lambda g: g.EdgeConv(_mlp(48, 24))),
        "generalised": _conv(lambda g: g.GENConv(24, 24), residual=True),
        "arma": _conv(lambda g: g.ARMAConv(24, 24, num_stacks=2)),
        "heterogeneous": _typed,
        "dynamic": _dynamic,
        "polynormer": _polynormer,
        "pool_mean": _pooled("mean"),
        "pool_max": _pooled("max"),
        "pool_add": _pooled("add"),
    }
