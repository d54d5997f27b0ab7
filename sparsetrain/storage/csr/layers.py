"""Layers whose weight is a vector of non-zeros and a pattern, never a dense matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from sparsetrain._untraced import untraced
from sparsetrain.random_choice import random_ranks
from sparsetrain.storage.csr.pattern import Pattern, check
from sparsetrain.storage.csr.product import multiply
from sparsetrain.storage.csr.tape import Tape

#: Dtypes that the products are made for.
DTYPES = (torch.float32, torch.float64)


class SparseLayer(nn.Module):
    """What sparse layers share. A state dict holds `values`, `row_pointers` and `columns`.

    Attributes:
        values: parameter [nnz], the non-zero weights, row by row.
        pattern: where they are in the weight, seen as a matrix [out, everything else].
        weight_shape: the shape of the weight that is stood for.
    """

    values: Parameter
    pattern: Pattern
    weight_shape: tuple[int, ...]
    #: Keeps the factors of the dense gradient while a policy wants it (see `Tape`).
    tape: Tape | None

    def hold(self, values: Tensor, pattern: Pattern, weight_shape: tuple[int, ...]) -> None:
        """Set values and pattern.

        The `values` parameter keeps its identity while its size stays. Autograd knows a parameter
        by its size, so another number of non-zeros is another parameter.
        """
        self.pattern, self.weight_shape = pattern, weight_shape
        held = self._parameters.get("values")
        if held is not None and held.shape == values.shape:
            with torch.no_grad():
                held.copy_(values)
        elif isinstance(values, Parameter):
            self.values = values
        else:
            grad = held is None or held.requires_grad
            self.values = Parameter(values.detach(), requires_grad=grad)

    @property
    def weight(self) -> Tensor:
        """A dense copy of the weight. Writing to it changes nothing."""
        return self.to_dense()

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The weight as a dense tensor of `weight_shape`."""
        dense = self.values.new_zeros(math.prod(self.weight_shape))
        dense[self.pattern.flat()] = self.values
        return dense.view(self.weight_shape)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw values and bias anew; places stay."""
        bound = 1 / math.sqrt(max(1.0, self.pattern.nnz / self.pattern.shape[0]))
        self.values.uniform_(-bound, bound, generator=generator)
        bias = self._parameters["bias"]
        if bias is not None:
            bias.uniform_(-bound, bound, generator=generator)

    def _multiply(self, x: Tensor) -> Tensor:
        """[batch, in] -> [out, batch], feature-major."""
        # Loops of numba cannot be traced, and the number of values may change with the mask.
        return untraced(self._multiply_now)(x)

    def _multiply_now(self, x: Tensor) -> Tensor:
        values, bias = self._parameters["values"], self._parameters["bias"]
        assert values is not None
        if not (x.is_cpu and values.is_cpu):
            raise ValueError(
                "csr storage computes on the CPU: move the model back, or train it with "
                "storage='masked'"
            )
        dtype = values.dtype
        if dtype not in DTYPES:
            raise ValueError(
                f"csr storage multiplies float32 and float64, and the layer was moved to {dtype}"
            )
        if bias is not None and bias.dtype != dtype:
            raise ValueError(f"the bias is {bias.dtype} and the values are {dtype}")
        tape = self.tape if torch.is_grad_enabled() else None
        if tape is not None:
            tape.attach(values)
        return multiply(x.to(dtype), values, bias, self.pattern, tape)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "row_pointers"] = self.pattern.pointers
        destination[prefix + "columns"] = self.pattern.columns

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        keys = [prefix + name for name in ("values", "row_pointers", "columns")]
        values, pointers, columns = (state_dict.get(key) for key in keys)
        if values is None or pointers is None or columns is None:
            missing_keys.extend(key for key in keys if key not in state_dict)
        else:
            try:
                self._load(values, pointers, columns)
            except ValueError as error:
                error_msgs.append(f"{prefix}weight: {error}")
        rest = {key: value for key, value in state_dict.items() if key not in keys}
        missing: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys.extend(key for key in missing if key not in keys)

    def _load(self, values: Tensor, pointers: Tensor, columns: Tensor) -> None:
        check(self.pattern.shape, pointers, columns)
        if values.shape != columns.shape:
            raise ValueError(f"{values.numel()} values for {columns.numel()} non-zeros")
        pattern = Pattern(self.pattern.shape, pointers.clone(), columns.clone())
        if pattern == self.pattern:
            pattern = self.pattern  # with what it remembers
        self.hold(values.detach().to(self.values.dtype).clone(), pattern, self.weight_shape)


class SparseLinear(SparseLayer, nn.Linear):  # type: ignore[override]
    """y = x W^T + b with a sparse W that never exists densely.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        density: share of weights that are held, in (0, 1]; they are placed at random.
        bias: whether there is a bias.
        generator: CPU random source of places and values; torch's own by default.

    The values start as those of `nn.Linear` with as many inputs as a row has connections on
    average: uniform within 1 / sqrt(connections) (Evci et al. 2022, "Gradient flow in sparse neural
    networks", section 3: what matters is the number of connections of a unit).

    Shapes: x [..., in_features] -> [..., out_features]; CPU, float32 (fast) or float64.

    Raises:
        ValueError: for a density out of range, or one that leaves no connection.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        density: float,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.tape = None
        numel = in_features * out_features
        count = round(density * numel) if 0 < density <= 1 else 0
        if count < 1:
            raise ValueError(
                f"density={density} of {out_features} x {in_features} weights must be in (0, 1] "
                "and leave at least one"
            )
        flat = random_ranks(numel, count, generator)
        pattern = Pattern.of(flat, (out_features, in_features))
        self.hold(torch.empty(count, dtype=dtype), pattern, (out_features, in_features))
        bias_or_none = Parameter(torch.empty(out_features, dtype=dtype)) if bias else None
        self.register_parameter("bias", bias_or_none)
        self.reset_parameters(generator)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"the input has {input.shape[-1]} features and the layer {self.in_features}"
            )
        out = self._multiply(input.reshape(-1, self.in_features)).t()
        if input.dim() == 2:
            return out
        # What follows a sequence is written for rows.
        return out.contiguous().view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nnz={self.pattern.nnz}"
        )


class FollowingLinear(nn.Linear):
    """A dense layer that computes in the layout of its input.

    Sparse layers give feature-major results. `nn.Linear` answers with a row-major gradient, and an
    activation between the two then mixes both layouts, at which torch is many times slower.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if input.shape[-1] != self.in_features:
            return super().forward(input)  # which says so
        rows = input.reshape(-1, self.in_features)
        if rows.stride(0) != 1 or rows.shape[0] == 1:
            return super().forward(input)
        bias = self._parameters["bias"]
        if bias is None:
            out = self.weight @ rows.t()
        else:
            out = torch.addmm(bias.unsqueeze(1), self.weight, rows.t())
        return out.t().reshape(*input.shape[:-1], self.out_features)


class SparseConv2d(SparseLayer, nn.Conv2d):  # type: ignore[override]
    """A convolution as the product of a sparse weight and unfolded patches; made by conversion.

    Shapes: x [N, C, H, W] or [C, H, W] -> as `nn.Conv2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H', W']."""
        batched = input if input.dim() == 4 else input.unsqueeze(0)
        if batched.shape[1] != self.in_channels:
            raise ValueError(
                f"the input has {batched.shape[1]} channels and the layer {self.in_channels}"
            )
        number = batched.shape[0]
        height, width = self._output_size(batched.shape[2], batched.shape[3])
        # [in_channels * positions of the kernel, N * H' * W']
        features = self._patches(batched).transpose(0, 1).reshape(self.pattern.shape[1], -1)
        out = self._multiply(features.t())
        out = out.view(self.out_channels, number, height, width).transpose(0, 1).contiguous()
        return out if input.dim() == 4 else out.squeeze(0)

    def _patches(self, x: Tensor) -> Tensor:
        """[N, features, positions]."""
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            return x[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)
        padding: Any = self.padding
        return F.unfold(x, self.kernel_size, self.dilation, padding, self.stride)

    def _output_size(self, *size: int) -> list[int]:
        padding: Any = self.padding
        parts = zip(size, padding, self.dilation, self.kernel_size, self.stride, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in parts]

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{nn.Conv2d.extra_repr(self)}, nnz={self.pattern.nnz}"  # type: ignore[no-untyped-call]
