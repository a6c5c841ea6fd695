"""F of the second-order saliency, gathered from the micro-batches that train."""

from torch import Tensor, nn


class Fisher:
    """The diagonal Fisher: the mean of squared micro-batch gradients (docs/method.md section 3).

    At steps with a removal due it holds two more copies of the weights: the squares, and the gradient so far.
    """

    def __init__(self, model: nn.Module, num_micro_batches: int) -> None:
        self.model, self.count = model, num_micro_batches
        self.squares: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self) -> None:
        """Takes the gradient of one micro-batch, of the loss over their number, out of the model."""
        for name, param in self.model.named_parameters():
            if param.grad is None:
                continue
            gradient, param.grad = param.grad, None
            square = (gradient * self.count).square_() / self.count
            self.squares[name] = self.squares[name].add_(square) if name in self.squares else square
            # a copy: DDP's gradients are views of buckets that the next micro-batch overwrites
            self.sums[name] = self.sums[name].add_(gradient) if name in self.sums else gradient.clone()

    def finish(self) -> dict[str, Tensor]:
        """Puts the whole gradient back into the model and returns F by parameter name."""
        for name, param in self.model.named_parameters():
            param.grad = self.sums.get(name)
        return self.squares
