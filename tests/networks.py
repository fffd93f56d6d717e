"""Networks that tests convert: the classical ones, small, and random ones."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fn(nn.Module):
    """A function of the module and its input; tensors and modules that it uses are attributes."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Joint(Fn):
    """A function of several inputs, inside a network."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode with statistics, scales and shifts of normalisation at random."""
    g = torch.Generator().manual_seed(seed)
    for part in net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            n = part.num_features
            with torch.no_grad():
                part.running_mean.copy_(0.3 * torch.randn(n, generator=g))
                part.running_var.copy_(0.5 + torch.rand(n, generator=g))
                if part.affine:
                    part.weight.copy_(0.5 + torch.rand(n, generator=g))
                    part.bias.copy_(0.3 * torch.randn(n, generator=g))
    return net.eval()


# ---- classical networks, narrow ------------------------------------------------------------------


def mlp(*phis: nn.Module, width: int = 6) -> nn.Module:
    """3 -> width -> ... -> 2 with these activations."""
    layers: list[nn.Module] = []
    for k, phi in enumerate(phis):
        layers += [nn.Linear(width if k else 3, width), phi]
    return nn.Sequential(*layers, nn.Linear(width, 2))


def lenet() -> nn.Module:
    """For (1, 16, 16)."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 5), nn.Tanh(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 10), nn.Softmax(-1),
    )  # fmt: skip


def vgg(*widths: "int | str", inputs: int = 3) -> nn.Module:
    """Convolutions with normalisation, "M" for max-pooling; for (3, 16, 16)."""
    layers: list[nn.Module] = []
    for width in widths:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width),
                       nn.ReLU(inplace=True)]  # fmt: skip
            inputs = width
    return nn.Sequential(
        nn.Sequential(*layers), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(),
        nn.Linear(4 * inputs, 10), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(10, 5),
    )  # fmt: skip


class BasicBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), the sum in place."""

    def __init__(self, inputs: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet-18 where width is 64; for (3, 32, 32)."""

    def __init__(self, width: int = 8, blocks: int = 2, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        layers, inputs = [], width
        for k in range(4):
            own = []
            for i in range(blocks):
                own.append(BasicBlock(inputs, width << k, 2 if k and not i else 1))
                inputs = width << k
            layers.append(nn.Sequential(*own))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PreActivation(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))) (He et al. 2016), for (3, 8, 8)."""

    def __init__(self, width: int = 4, blocks: int = 2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2 * blocks))
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2 * blocks)
        )
        self.last = nn.BatchNorm2d(width)

    def forward(self, x):
        x = self.stem(x)
        for k in range(0, len(self.convs), 2):
            y = self.convs[k](F.relu(self.norms[k](x)))
            x = x + self.convs[k + 1](F.relu(self.norms[k + 1](y)))
        return F.relu(self.last(x)).mean((-2, -1))


class UNet(nn.Module):
    """Down twice, up twice, joined at each level; for (2, 8, 8)."""

    def __init__(self, up: str = "transposed", width: int = 3):
        super().__init__()

        def double(i: int, o: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
                nn.Conv2d(o, o, 3, padding=1), nn.LeakyReLU(0.2, inplace=True),
            )  # fmt: skip

        def rise(i: int, o: int) -> nn.Module:
            if up == "transposed":
                return nn.ConvTranspose2d(i, o, 2, 2)
            kind = {} if up == "nearest" else {"align_corners": up == "corners"}
            mode = "nearest" if up == "nearest" else "bilinear"
            return nn.Sequential(nn.Upsample(scale_factor=2, mode=mode, **kind), nn.Conv2d(i, o, 1))

        w = width
        self.down1, self.down2, self.floor = double(2, w), double(w, 2 * w), double(2 * w, 4 * w)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = rise(4 * w, 2 * w), rise(2 * w, w)
        self.out2, self.out1 = double(4 * w, 2 * w), double(2 * w, w)
        self.head = nn.Conv2d(w, 1, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(self.pool(a))
        c = self.floor(self.pool(b))
        d = self.out2(torch.cat([b, self.up2(c)], dim=1))
        return self.head(self.out1(torch.cat((self.up1(d), a), 1)))


class Inception(nn.Module):
    """Four branches joined (Szegedy et al. 2015), for (3, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 2, 1)
        self.three = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 3, padding=1))
        self.five = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 5, padding=2))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 2, 1))
        self.head = nn.Conv2d(11, 4, 3, stride=2)

    def forward(self, x):
        branches = [F.relu(part(x)) for part in (self.one, self.three, self.five, self.pool)]
        return self.head(torch.cat(branches, -3)).flatten(1)


class DenseNet(nn.Module):
    """Each layer reads all before it (Huang et al. 2017), for (3, 8, 8)."""

    def __init__(self, growth: int = 2, layers: int = 4):
        super().__init__()
        widths = [3 + growth * k for k in range(layers)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, growth, 3, padding=1))
            for w in widths
        )
        self.head = nn.Linear(3 + growth * layers, 3)

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(F.adaptive_avg_pool2d(torch.cat(features, 1), 1).flatten(1))


class RNNLoop(nn.Module):
    """h_t = tanh(W x_t + U h_(t-1)) by hand, from zeros that `start` makes of the input."""

    def __init__(self, start=None, width: int = 4):
        super().__init__()
        self.start = start
        self.own, self.back = nn.Linear(3, width), nn.Linear(width, width, bias=False)

    def forward(self, x):
        h = None if self.start is None else self.start(x)
        states = []
        for t in range(x.shape[1]):
            z = self.own(x[:, t])
            h = torch.tanh(z if h is None else z + self.back(h))
            states.append(h)
        return torch.stack(states, dim=1)


# ---- random networks -----------------------------------------------------------------------------


class RandomNet(nn.Module):
    """A random graph of operations, made by running it once; each result may be read again.

    Args:
        seed: of everything.
        length: how many operations.
    """

    def __init__(self, seed: int, length: int = 12):
        super().__init__()
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        shapes = [(5,), (3, 4), (2, 6, 6), (3, 8, 5), (1, 9, 8), (4, 10), (2, 3, 4, 4)]
        self.input_shape = self.random.choice(shapes)
        self.steps: list[tuple[int, tuple[int, ...]]] = []
        self.parts = nn.ModuleList()
        values = [torch.randn(2, *self.input_shape)]
        with torch.no_grad():
            while len(self.steps) < length:
                self._grow(values)
            read = {i for _, inputs in self.steps for i in inputs}
            loose = [i for i in range(1, len(values)) if i not in read]
            loose = loose[-3:]  # more than three results that nobody reads are dead branches
            for i in loose:
                width = values[i][0].numel()
                self._add(values, nn.Sequential(nn.Flatten(), nn.Linear(width, 3)), i)
            ends = tuple(range(len(values) - len(loose), len(values)))
            joined = self.random.choice([_total, _joined])
            self._add(values, Joint(joined), *ends)
        randomised(self, seed)

    def forward(self, x):
        values = [x]
        for k, inputs in self.steps:
            values.append(self.parts[k](*[values[i] for i in inputs]))
        return values[-1]

    def _add(self, values: list[Tensor], part: nn.Module, *inputs: int) -> None:
        values.append(randomised(part)(*[values[i] for i in inputs]))
        self.parts.append(part)
        self.steps.append((len(self.parts) - 1, inputs))

    def _grow(self, values: list[Tensor]) -> None:
        r = self.random
        i = len(values) - 1 if r.random() < 0.55 else r.randrange(len(values))
        x = values[i]
        if r.random() < 0.12 and self.steps:  # a module once more
            k, inputs = r.choice(self.steps)
            if len(inputs) == 1 and values[inputs[0]].shape == x.shape:
                values.append(self.parts[k](x))
                self.steps.append((k, (i,)))
                return
        alike = [j for j, v in enumerate(values) if v.shape == x.shape and j != i]
        if alike and r.random() < 0.3:
            self._add(values, Joint(r.choice(PAIRS)), i, r.choice(alike))
            return
        makers = [_linear_part, _activation_part, _moving_part, _constant_part, _image_part]
        (made,) = r.choices(makers, [2, 3, 3, 3, 6])
        part = made(r, tuple(x.shape[1:]))
        if part is not None:
            self._add(values, part, i)


def _total(self, *xs):
    return sum(xs[1:], xs[0])


def _joined(self, *xs):
    return torch.cat(xs, 1)


PAIRS = [
    lambda self, x, y: x + y,
    lambda self, x, y: x - 0.5 * y,
    lambda self, x, y: torch.add(x, y, alpha=-0.3),
    lambda self, x, y: torch.cat([x, y], -1)[..., :: 2] if x.shape[-1] % 2 == 0 else x + y,
    lambda self, x, y: torch.cat([y, x], 1),
    lambda self, x, y: torch.stack([x, y], -1).sum(-1),
    lambda self, x, y: torch.maximum(x, y),
    lambda self, x, y: F.relu(torch.cat((x, y, x), 1), inplace=True),
]  # fmt: skip


def _linear_part(r: random.Random, shape: tuple[int, ...]) -> nn.Module | None:
    w, o = shape[-1], r.randint(2, 6)
    return r.choice([
        lambda: nn.Linear(w, o, bias=r.random() < 0.7),
        lambda: nn.Sequential(nn.Linear(w, o), nn.ReLU()),
        lambda: Fn(lambda self, x: x @ self.W, W=torch.randn(w, o) / w**0.5),
        lambda: Fn(lambda self, x: F.linear(x, self.W.T, self.b),
                   W=torch.randn(w, o) / w**0.5, b=torch.randn(o)),
    ])()  # fmt: skip


def _activation_part(r: random.Random, shape: tuple[int, ...]) -> nn.Module | None:
    return r.choice([
        nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Softplus, nn.ReLU6, nn.Softshrink,
        lambda: nn.LeakyReLU(0.2), lambda: nn.ELU(0.7), lambda: nn.Softmax(-1),
        lambda: nn.Softmax(1), lambda: nn.Hardtanh(-0.5, 0.8),
        lambda: Fn(lambda self, x: torch.relu_(0.7 * x + 0.1)),
        lambda: Fn(lambda self, x: x.clamp(-0.5, 0.6)),
        lambda: Fn(lambda self, x: (x - 0.2).abs()),
    ])()  # fmt: skip


def _moving_part(r: random.Random, shape: tuple[int, ...]) -> nn.Module | None:
    n, last = len(shape), len(shape) and shape[-1]
    order = [1 + k for k in r.sample(range(n), n)]
    dim = r.randint(1, n)
    size = shape[dim - 1]
    cut = r.randrange(size)
    half = next((k for k in (2, 3, 5) if size % k == 0), 1)
    return Fn(r.choice([
        lambda self, x: x.permute(0, *order),
        lambda self, x: x.flatten(1) if n <= 2 else x.flatten(-2),
        lambda self, x: x.reshape(x.shape[0], -1, last),
        lambda self, x: x[..., :1].expand(*x.shape),
        lambda self, x: x.flip(dim),
        lambda self, x: x.roll(1, -1),
        lambda self, x: x[..., 1:] if last > 1 else x,
        lambda self, x: x[:, cut:cut + 1] if dim == 1 else x[..., -1:],
        lambda self, x: x.select(dim, cut) if n > 1 else x,
        lambda self, x: torch.cat(x.split(half, dim)[::-1], dim),
        lambda self, x: sum(x.chunk(half, dim)),
        lambda self, x: x.unsqueeze(dim).squeeze(dim),
        lambda self, x: F.pad(x, (1, 2)),
        lambda self, x: F.pad(x, (2, 0), value=0.3),
        lambda self, x: x.mean(dim, keepdim=True),
        lambda self, x: 0.3 * x.sum(dim) if n > 1 else x,
        lambda self, x: x.transpose(-1, dim),
        lambda self, x: torch.stack(x.unbind(dim)[::2], dim),
        lambda self, x: x.unflatten(dim, (half, -1)).flatten(dim, dim + 1),
    ]))  # fmt: skip


def _constant_part(r: random.Random, shape: tuple[int, ...]) -> nn.Module | None:
    c, last = shape[0], shape[-1]
    ones = (1,) * (len(shape) - 1)
    return r.choice([
        lambda: Fn(lambda self, x: x + self.b, b=torch.randn(last)),
        lambda: Fn(lambda self, x: self.b - x, b=torch.randn(c, *ones)),
        lambda: Fn(lambda self, x: x * self.s, s=torch.randn(last)),
        lambda: Fn(lambda self, x: self.s * x, s=torch.randn(*shape)),
        lambda: Fn(lambda self, x: self.s * x + self.b, s=torch.randn(c, *ones), b=torch.randn(1)),
        lambda: Fn(lambda self, x: x / self.s, s=1 + torch.rand(1, *shape)),
        lambda: Fn(lambda self, x: 1.5 - x / 3),
        lambda: Fn(lambda self, x: -(2 * x) + 1),
        lambda: Fn(lambda self, x: x.mul(0.5).add(0.25)),
    ])()  # fmt: skip


def _image_part(r: random.Random, shape: tuple[int, ...]) -> nn.Module | None:
    """Convolutions and so on, where the sample is an image in 1, 2 or 3 dimensions."""
    spatial = len(shape) - 1
    if spatial == 0:
        return nn.BatchNorm1d(shape[0])
    if not 1 <= spatial <= 3 or min(shape[1:]) < 3 or torch.Size(shape).numel() > 2000:
        return None
    c, o, s = shape[0], r.randint(1, 4), str(spatial) + "d"
    even = c % 2 == 0

    def of(name: str, *args, **kwargs) -> nn.Module:
        return getattr(nn, name + s)(*args, **kwargs)

    return r.choice([
        lambda: of("Conv", c, o, 3, padding=1),
        lambda: of("Conv", c, o, 3, stride=2, padding=2, bias=False),
        lambda: of("Conv", c, 2 * o, 2, groups=2 if even else 1, padding=1, dilation=2),
        lambda: of("Conv", c, 2 * c, 3, groups=c, padding="same"),
        lambda: of("Conv", c, o, 3, padding=1, padding_mode=r.choice(
            ["reflect", "circular", "replicate"])),
        lambda: of("ConvTranspose", c, o, 2, stride=2, output_padding=1),
        lambda: of("BatchNorm", c),
        lambda: nn.Sequential(of("BatchNorm", c), nn.ReLU(inplace=True), of("Conv", c, o, 1)),
        lambda: of("AvgPool", 2, stride=1, padding=1, count_include_pad=r.random() < 0.5),
        lambda: of("AvgPool", 3, ceil_mode=True, stride=2),
        lambda: of("MaxPool", 2),
        lambda: of("MaxPool", 3, stride=2, padding=1, ceil_mode=True),
        lambda: of("AdaptiveAvgPool", 2),
        lambda: nn.Upsample(scale_factor=2) if torch.Size(shape).numel() < 100 else nn.Identity(),
    ])()  # fmt: skip
