"""An output layer that is nothing but a weight and a bias: hidden states -> logits."""

import torch

# Elements of a weight that are turned into float32 at once: 16 MB.
UPCAST_AT_ONCE = 2**22


class Product:
    """A weight (V, H) with a bias (V,) or None, and the memory for logits of some rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight, bias
        self.dtype = torch.promote_types(weight.dtype, torch.float32)  # of the logits
        self._logits: torch.Tensor | None = None
        self._upcast: torch.Tensor | None = None  # a part of the weight

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) = hidden (n, H) weight^T + bias, in float32 or, for weights in float64, in
        float64; the next call overwrites them."""
        weight, size = self.weight, len(hidden) * len(self.weight)
        # Kept, because allocating 32 MB for each product costs a CPU about as much as the product.
        self._logits = _memory(self._logits, size, self.dtype, hidden.device)
        logits = self._logits[:size].view(len(hidden), len(weight))
        if hidden.dtype == weight.dtype == self.dtype:
            torch.mm(hidden, weight.t(), out=logits)
        elif hidden.dtype == weight.dtype and _keeps_float32(hidden.device):
            torch.mm(hidden, weight.t(), self.dtype, out=logits)
        else:
            self._upcast_product(hidden.to(self.dtype), logits)
        return logits if self.bias is None else logits.add_(self.bias)

    def _upcast_product(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """The product where it cannot be had in float32 from the types that there are."""
        num_rows, hidden_size = self.weight.shape
        at_once = max(1, UPCAST_AT_ONCE // max(1, hidden_size))
        size = min(at_once, num_rows) * hidden_size
        self._upcast = _memory(self._upcast, size, self.dtype, hidden.device)
        for first in range(0, num_rows, at_once):
            part = self.weight[first : first + at_once]
            upcast = self._upcast[: part.numel()].view(part.shape).copy_(part)
            torch.mm(hidden, upcast.t(), out=logits[:, first : first + len(part)])


def _memory(
    kept: torch.Tensor | None, size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`kept` if it will do, else new memory."""
    if kept is not None and (kept.dtype, kept.device) == (dtype, device) and len(kept) >= size:
        return kept
    return torch.empty(size, dtype=dtype, device=device)


def _keeps_float32(device: torch.device) -> bool:
    """Whether torch multiplies two matrices of 16 bits into one of 32."""
    return device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")
