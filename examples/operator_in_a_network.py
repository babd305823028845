"""The operator alone in a network of one's own: a small classifier whose tokens mix by four line scans.

python examples/operator_in_a_network.py            # a minute on two CPU cores: about 85% of held-out images right
python examples/operator_in_a_network.py --steps 20
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cgspn.data import load_embedded, to_float
from cgspn.ops import DIRECTIONS, explain_backend, propagate_2d


class ScanBlock(nn.Module):
    """Features [B, H, W, C] plus what four scans bring to each position, then plus an MLP of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        # One linear layer makes lam, u and three logits for each direction and channel. The operator reads the views.
        self.parameters_of = nn.Linear(channels, len(DIRECTIONS) * 5 * channels)
        self.mix = nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        nn.init.normal_(self.parameters_of.weight, std=0.02)
        with torch.no_grad():  # begin with lam = u = 0.5 and equal weights for the three neighbours
            self.parameters_of.bias.view(len(DIRECTIONS), 5, channels).copy_(
                torch.tensor([0.5, 0.5, 0, 0, 0])[:, None].expand(-1, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same shape, for any H and W."""
        tokens = self.norm1(x)
        packed = self.parameters_of(tokens).unflatten(-1, (len(DIRECTIONS), 5, -1))  # [B, H, W, 4, 5, C]
        lam, u, logits = packed[..., 0, :], packed[..., 1, :], packed[..., 2:, :]
        x = x + self.mix(propagate_2d(tokens, logits, lam, u))
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """Images [B, 3, H, W] to logits [B, classes]."""

    def __init__(self, classes: int, channels: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 4, 4)
        self.blocks = nn.Sequential(*(ScanBlock(channels) for _ in range(depth)))
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Positions are not encoded: the scans start at the borders, which tell a position where it is."""
        return self.head(self.blocks(self.patches(images).permute(0, 2, 3, 1)).mean((1, 2)))


def main(arguments: list[str] | None = None) -> float:
    """Returns the share of held-out images that are classified right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    train, test = load_embedded("train"), load_embedded("test").subset(torch.arange(1000))
    network = Classifier(len(train.class_names))
    print(explain_backend(torch.zeros(1, 7, 7, 32)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.steps)
    for step in range(options.steps):
        chosen = torch.randint(len(train), (64,))
        loss = cross_entropy(network(to_float(train.images[chosen])), train.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.2f}")
    with torch.inference_mode():
        right = (network(to_float(test.images)).argmax(1) == test.labels).float().mean().item()
    print(f"{right:.1%} of {len(test)} held-out images right")
    return right


if __name__ == "__main__":
    main()
