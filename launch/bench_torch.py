"""The yardstick of launch/bench.py: DDPM++ (no labels, positional embedding) and its EDM step in eager PyTorch.

A worker: the first line on stdin is a JSON job, then every line is "forward N" or "train N" and is answered
with the N times in seconds. It computes while the other side waits, so that measurements can alternate.
"""

import json
import math
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Norm(nn.GroupNorm):
    def __init__(self, channels: int):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)


class Block(nn.Module):
    """Residual block of DDPM++; attention over pixels where asked."""

    def __init__(self, inputs: int, outputs: int, embedding: int, resample: str = "", attend: bool = False):
        super().__init__()
        self.inputs, self.resample = inputs, resample
        self.norm0, self.norm1 = Norm(inputs), Norm(outputs)
        self.conv0, self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.affine = nn.Linear(embedding, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs or resample else None
        self.attend = attend
        if attend:
            self.norm2, self.qkv, self.proj = Norm(outputs), nn.Conv2d(outputs, 3 * outputs, 1), nn.Conv2d(outputs, outputs, 1)

    def _resampled(self, x):
        if self.resample == "up":
            return functional.interpolate(x, scale_factor=2, mode="nearest")
        return functional.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x, embedding):
        h = self.conv0(self._resampled(functional.silu(self.norm0(x))))
        h = functional.silu(self.norm1(h + self.affine(embedding)[:, :, None, None]))
        x = (self.conv1(h) + (self.skip(self._resampled(x)) if self.skip else x)) * math.sqrt(0.5)
        if not self.attend:
            return x
        q, k, v = self.qkv(self.norm2(x)).reshape(x.shape[0], x.shape[1], 3, -1).unbind(2)
        weights = (q.transpose(1, 2) @ (k / math.sqrt(x.shape[1]))).softmax(-1)
        return (self.proj((v @ weights.transpose(1, 2)).reshape(x.shape)) + x) * math.sqrt(0.5)


class DDPMpp(nn.Module):
    """Raw network F of (images NCHW, noise label (B,)); parameters have the released names."""

    def __init__(self, size: int, channels: int, mults: list[int], blocks: int, attention: int, augment: int):
        super().__init__()
        self.channels = channels
        width = 4 * channels
        self.map_augment = nn.Linear(augment, channels, bias=False)  # of the released weights; labels are not given here
        self.map_layer0, self.map_layer1 = nn.Linear(channels, width), nn.Linear(width, width)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        now, skips = channels, [channels]
        for level, mult in enumerate(mults):
            name = f"{size >> level}x{size >> level}"
            if level == 0:
                self.enc[f"{name}_conv"] = nn.Conv2d(3, now, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = Block(now, now, width, "down")
                skips.append(now)
            for i in range(blocks):
                self.enc[f"{name}_block{i}"] = Block(now, channels * mult, width, attend=size >> level == attention)
                now = channels * mult
                skips.append(now)
        for level, mult in reversed(list(enumerate(mults))):
            name = f"{size >> level}x{size >> level}"
            if level == len(mults) - 1:
                self.dec[f"{name}_in0"] = Block(now, now, width, attend=True)
                self.dec[f"{name}_in1"] = Block(now, now, width)
            else:
                self.dec[f"{name}_up"] = Block(now, now, width, "up")
            for i in range(blocks + 1):
                attend = i == blocks and size >> level == attention
                self.dec[f"{name}_block{i}"] = Block(now + skips.pop(), channels * mult, width, attend=attend)
                now = channels * mult
        self.dec[f"{size}x{size}_aux_norm"] = Norm(now)
        self.dec[f"{size}x{size}_aux_conv"] = nn.Conv2d(now, 3, 3, padding=1)

    def forward(self, x, label):
        half = self.channels // 2
        angles = label[:, None] * 10_000 ** (-torch.arange(half) / (half - 1))
        embedding = functional.silu(self.map_layer0(torch.cat([angles.sin(), angles.cos()], dim=1)))
        embedding = functional.silu(self.map_layer1(embedding))
        skips = []
        for block in self.enc.values():
            x = block(x, embedding) if isinstance(block, Block) else block(x)
            skips.append(x)
        for block in self.dec.values():
            if isinstance(block, Block):
                if x.shape[1] != block.inputs:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, embedding)
            else:
                x = block(functional.silu(x) if isinstance(block, nn.Conv2d) else x)
        return x


def edm_loss(network, image, sigma, noise):
    """EDM's weighted squared error, sum over pixels and mean over the batch. Karras 2022, eq. 2 and 8, sigma_data 0.5."""
    sigma = sigma[:, None, None, None]
    total = sigma**2 + 0.25
    x = image + sigma * noise
    raw = network(x / total.sqrt(), sigma.flatten().log() / 4)
    denoised = 0.25 / total * x + sigma * 0.5 / total.sqrt() * raw
    return (total / (sigma * 0.5) ** 2 * (denoised - image) ** 2).sum() / image.shape[0]


def main() -> None:
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    arrays = {name: torch.from_numpy(value) for name, value in np.load(job["arrays"]).items()}
    image, label, sigma, noise = (arrays.pop(name) for name in ("image", "label", "sigma", "noise"))
    network = DDPMpp(**job["network"])
    network.load_state_dict(arrays)  # strict
    optimizer = torch.optim.Adam(network.parameters(), lr=job["learning_rate"])

    def forward():
        with torch.no_grad():
            return network(image, label)

    def train():
        optimizer.zero_grad(set_to_none=True)
        normal = torch.randn(image.shape[0])
        loss = edm_loss(network, image, (normal * 1.2 - 1.2).exp(), torch.randn_like(image))
        loss.backward()
        optimizer.step()

    loss = edm_loss(network, image, sigma, noise)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm()
    np.savez(job["answer"], output=forward().numpy(), loss=loss.item(), gradient=gradient.item())
    print(json.dumps({"torch": torch.__version__, "parameters": sum(p.numel() for p in network.parameters())}), flush=True)
    for line in sys.stdin:
        what, count = line.split()
        times = []
        for _ in range(int(count)):
            start = time.perf_counter()
            {"forward": forward, "train": train}[what]()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
