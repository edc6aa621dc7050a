"""PowerSGD: low-rank compression of gradients with error feedback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from colltensor.errors import OptionError
from colltensor.torch.buckets import Bucket
from colltensor.torch.compression import COMPRESSED


@dataclass(slots=True)
class _Memory:
    """What is kept of one matrix: the error not yet sent, and the last right factor."""

    error: torch.Tensor
    right: torch.Tensor


class PowerSGD:
    """Sends two thin factors of every gradient matrix; their error goes with the next ones.

    A gradient of two dimensions or more is a matrix M of n rows (its first dimension) and m
    columns. The error of the step before is added to M. Each rank sends P = M Q, takes the average,
    and makes its columns orthonormal. It sends Q = M' P, takes the average, and uses P Q' as the
    gradient; M - P Q' is the next step's error. It is one power iteration a step, from the last
    step's Q (Vogels, Karimireddy, Jaggi: PowerSGD, NeurIPS 2019, algorithms 1 and 2). Vectors, and
    matrices that would not become smaller by ``min_rate``, travel as they are, in the same transfer
    as P.

    The ranks orthonormalise the same bits with the same code, so that they stay identical on
    machines of one kind. Between kinds of CPU the factorisation may differ in the last place. A
    step whose gradients are not finite (as with ``torch.amp``'s scaling) leaves no trace in the
    memory. The memory is as large as the gradients.

    Args:
        rank: Columns of the factors: more are more exact and larger.
        min_rate: Compress a matrix only if its factors have at most this part of its elements, as 1
            / min_rate.
        seed: Of the first Q, the same on all ranks.
    """

    def __init__(self, rank: int = 1, *, min_rate: float = 2.0, seed: int = 0) -> None:
        if rank < 1 or min_rate <= 0:
            raise OptionError(
                f"PowerSGD: expected rank >= 1 and min_rate > 0, got {rank!r} and {min_rate!r}"
            )
        self._rank = rank
        self._min_rate = min_rate
        self._seed = seed
        self._memory: dict[str, _Memory] = {}

    def __repr__(self) -> str:
        return f"PowerSGD(rank={self._rank}, min_rate={self._min_rate}, seed={self._seed})"

    def reduce(self, bucket: Bucket) -> Iterator[torch.Tensor]:
        """Average by way of the factors: see Compression."""
        plain: list[torch.Tensor] = []
        matrices: list[tuple[torch.Tensor, str]] = []
        for gradient, name in zip(bucket.gradients, bucket.names, strict=True):
            if self._pays(gradient):
                matrices.append((gradient.reshape(gradient.shape[0], -1), name))
            else:
                plain.append(gradient)

        kept = [self._remembered(matrix, name) for matrix, name in matrices]
        for (matrix, _), memory in zip(matrices, kept, strict=True):
            memory.error.add_(matrix)  # from here on the matrix to be sent
        lefts = [memory.error @ memory.right for memory in kept]
        yield (together := _pack([*plain, *lefts], bucket.flat))
        lefts = _unpack(together, plain, lefts)
        lefts = [torch.linalg.qr(left).Q for left in lefts]
        if not matrices:
            return

        rights = [memory.error.mT @ left for memory, left in zip(kept, lefts, strict=True)]
        yield (together := _pack(rights, bucket.flat))
        rights = _unpack(together, [], rights)

        for gradient, name in zip(bucket.gradients, bucket.names, strict=True):
            if self._pays(gradient):
                self._use(gradient, name, lefts.pop(0), rights.pop(0))

    def _pays(self, gradient: torch.Tensor) -> bool:
        if gradient.dim() < 2 or gradient.dtype not in COMPRESSED or not gradient.numel():
            return False
        rows = gradient.shape[0]
        columns = gradient.numel() // rows
        return (rows + columns) * min(self._rank, rows, columns) * self._min_rate <= rows * columns

    def _remembered(self, matrix: torch.Tensor, name: str) -> _Memory:
        memory = self._memory.get(name)
        if (
            memory is None
            or memory.error.shape != matrix.shape
            or memory.error.dtype != matrix.dtype
        ):
            error = torch.zeros(matrix.shape, dtype=matrix.dtype, device=matrix.device)
            memory = self._memory[name] = _Memory(error, self._first_right(matrix, name))
        return memory

    def _first_right(self, matrix: torch.Tensor, name: str) -> torch.Tensor:
        """Return a random Q, the same on all ranks; the global random state stays as it was."""
        rows, columns = matrix.shape
        generator = torch.Generator().manual_seed(self._seed + sum(name.encode()) + columns)
        shape = columns, min(self._rank, rows, columns)
        return torch.randn(shape, generator=generator, dtype=matrix.dtype).to(matrix.device)

    def _use(
        self, gradient: torch.Tensor, name: str, left: torch.Tensor, right: torch.Tensor
    ) -> None:
        """Replace a gradient by the product of its factors, and remember what they lack."""
        memory = self._memory[name]
        product = left @ right.mT
        gradient.copy_(product.view(gradient.shape))
        if torch.isfinite(right).all():  # the average, so that all ranks decide alike
            memory.error.sub_(product)
            memory.right = right
        else:
            memory.error.zero_()
            memory.right = self._first_right(memory.error, name)


def _pack(tensors: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else like.new_empty(0)


def _unpack(
    packed: torch.Tensor, back: list[torch.Tensor], shapes: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Copy the first tensors back to their places; return the others as views with their shapes."""
    start = 0
    for tensor in back:
        tensor.copy_(packed[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()
    views = []
    for tensor in shapes:
        views.append(packed[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()
    return views
