# A graph network of 1,001 layers: nodes of a random graph learn their community from their neighbors.
# Each layer updates one group of features from another, so that the backward pass can undo it.
# Run: python examples/reversible_gnn.py
import torch
from torch import nn

import revnet
from revnet.nn import GroupedBlock

NUM_NODES, NUM_CLASSES, NUM_FEATURES = 400, 4, 32


class GraphLayer(nn.Module):
    """The mean over neighbors, a linear map and a normalization. The graph is an argument."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, dim)
        nn.init.normal_(self.linear.weight, std=0.02)  # 1,001 of these are added up

    def forward(self, x, mean_of_neighbors):
        return self.linear(mean_of_neighbors @ self.norm(x).relu())


class DeepGraphNetwork(nn.Module):
    """1,001 layers: half as many blocks of two groups, and one layer before them."""

    def __init__(self, num_layers):
        super().__init__()
        half = NUM_FEATURES // 2
        self.embed = nn.Linear(NUM_FEATURES, NUM_FEATURES)
        blocks = [GroupedBlock(GraphLayer(half), GraphLayer(half)) for _ in range(num_layers // 2)]
        self.blocks = revnet.ReversibleSequential(*blocks)
        self.head = nn.Sequential(nn.LayerNorm(NUM_FEATURES), nn.Linear(NUM_FEATURES, NUM_CLASSES))

    def forward(self, x, mean_of_neighbors):
        x = self.embed(mean_of_neighbors @ x)
        return self.head(self.blocks(x, mean_of_neighbors))


def communities():
    """Return noisy features, a graph whose edges mostly stay inside a community, and the labels."""
    labels = torch.arange(NUM_NODES) % NUM_CLASSES
    same = labels[:, None] == labels
    edges = (torch.rand(NUM_NODES, NUM_NODES) < torch.where(same, 0.10, 0.02)).float().triu(1)
    adjacency = edges + edges.T + torch.eye(NUM_NODES)
    features = torch.randn(NUM_NODES, NUM_FEATURES)
    features[:, :NUM_CLASSES] += nn.functional.one_hot(labels, NUM_CLASSES)
    return features, adjacency / adjacency.sum(1, keepdim=True), labels


def main():
    torch.manual_seed(0)
    x, mean_of_neighbors, labels = communities()
    known = torch.rand(NUM_NODES) < 0.2  # the labels to learn from
    model = DeepGraphNetwork(1001)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for update in range(1, 41):
        output = model(x, mean_of_neighbors)
        loss = nn.functional.cross_entropy(output[known], labels[known])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % 10 == 0:
            correct = (output.argmax(1) == labels)[~known].float().mean().item()
            print(f"update {update}: loss {loss.item():.3f}, accuracy on other nodes {correct:.2f}", flush=True)
    for num_layers in (11, 1001):
        model, bytes_of = DeepGraphNetwork(num_layers), {}
        for policy in ("reverse", "store"):
            revnet.set_policy(model, policy)
            predicted = revnet.memory.predict(model, x, mean_of_neighbors)
            bytes_of[policy] = predicted.activation_bytes
        print(f"{num_layers} layers: {bytes_of['reverse']:,} bytes reversed, {bytes_of['store']:,} stored")


if __name__ == "__main__":
    main()
