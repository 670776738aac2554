"""Log-probs of completion tokens and the loss on them, over chunks of tokens, so that the logits of a sequence never exist at once.

Of a chunk with final hidden states h (n, d), projection W (V, d) and targets y (n,), in float32:

    z = h W' / temperature,  logp = z_y - logsumexp(z),  p = softmax(z),  H = logsumexp(z) - sum p z

The loss of a token depends on logp and H alone, so the gradient of the chunk is known as soon as its logits are, and they go:

    dz = dL/dlogp (onehot(y) - p) - dL/dH p (log p + H),  dh = dz W / temperature,  dW += dz' h / temperature

That is 6 n d V operations, what forward and backward take anyway; holding a chunk's logits instead of all of them costs none more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

Objective = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
"""Log-probs (n,), entropies (n,) and which of all tokens they are -> the weighted loss (n,) of each, differentiable in the first two."""

_Grads = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Projected(NamedTuple):
    """`loss` is the sum over all tokens, differentiable; the others (N,) are what it was made of, without gradient."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropies: torch.Tensor


class Projection(NamedTuple):
    """The last layer of a model, temperature, and how many MiB of logits may exist at a time (None: all)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    temperature: float
    logits_mb: int | None

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor, objective: Objective) -> Projected:
        """The loss of tokens `targets` (N,) that follow the states `hidden` (N, d)."""
        needs = hidden.requires_grad, self.weight.requires_grad, self.bias is not None and self.bias.requires_grad
        loss, logprobs, entropies = _Loss.apply(  # type: ignore[no-untyped-call]  # torch's Function is untyped
            hidden, self.weight, self.bias, targets, self.temperature, self.logits_mb, objective, needs
        )
        return Projected(loss, logprobs, entropies)

    @torch.no_grad()
    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(N,) log-probs of `targets`, without gradient."""
        head, found = _Head(self.weight, self.bias, hidden), []
        for part in _parts(len(targets), head.rows, self.logits_mb):
            logits = head.logits(hidden[part], self.temperature)
            found.append(logits.gather(1, targets[part, None])[:, 0] - logits.logsumexp(-1))
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


def _parts(tokens: int, vocabulary: int, logits_mb: int | None) -> Iterator[slice]:
    size = max(tokens, 1) if logits_mb is None else max(1, logits_mb * 2**20 // (4 * vocabulary))
    for at in range(0, tokens, size):
        yield slice(at, min(at + size, tokens))


class _Head:
    """The projection in the type that it is computed in: that of autocast where it is on."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor) -> None:
        kind = hidden.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        self.kind, self.rows = kind, len(weight)
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)

    def logits(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        with torch.autocast(self.kind, enabled=False):
            logits = torch.nn.functional.linear(hidden.to(self.dtype), self.weight, self.bias).float()
        return logits.div_(temperature) if temperature != 1.0 else logits


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        logits_mb: int | None,
        objective: Objective,
        needs: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        head, tokens = _Head(weight, bias, hidden), len(targets)
        logprobs = torch.empty(tokens, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        total = torch.zeros((), device=hidden.device)
        to_hidden = torch.zeros_like(hidden) if needs[0] else None
        to_weight = torch.zeros_like(weight) if needs[1] else None
        to_bias = torch.zeros_like(bias) if needs[2] and bias is not None else None
        for part in _parts(tokens, head.rows, logits_mb):
            states, wanted = hidden[part], targets[part]
            z = head.logits(states, temperature)
            norm = z.logsumexp(-1)
            logprobs[part] = z.gather(1, wanted[:, None])[:, 0] - norm
            p = (z - norm[:, None]).exp_()
            entropies[part] = norm - torch.linalg.vecdot(p, z)
            loss, by_logprob, by_entropy = _derivatives(objective, logprobs[part], entropies[part], part)
            total += loss
            if not any(needs):
                continue
            dz = (
                z.sub_(norm[:, None]).add_(entropies[part, None]).mul_(p).mul_(-by_entropy[:, None])
                if by_entropy is not None
                else None
            )
            p.mul_(-by_logprob[:, None])
            p[torch.arange(len(wanted), device=p.device), wanted] += by_logprob
            dz = p if dz is None else dz.add_(p)
            if temperature != 1.0:
                dz.div_(temperature)
            if to_bias is not None:
                to_bias += dz.sum(0)
            with torch.autocast(head.kind, enabled=False):
                dz = dz.to(head.dtype)
                if to_hidden is not None:
                    to_hidden[part] = dz @ head.weight
                if to_weight is not None and to_weight.dtype == head.dtype:
                    to_weight.addmm_(dz.T, states.to(head.dtype))
                elif to_weight is not None:
                    to_weight += dz.T @ states.to(head.dtype)
        ctx.gradients = (to_hidden, to_weight, to_bias)
        ctx.mark_non_differentiable(logprobs, entropies)
        return total, logprobs, entropies

    @staticmethod
    def backward(ctx: Any, by_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        gradients = [None if one is None else one.mul_(by_loss) for one in ctx.gradients]
        del ctx.gradients
        return (*gradients, None, None, None, None, None)


def _derivatives(
    objective: Objective, logprobs: torch.Tensor, entropies: torch.Tensor, part: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The loss of a chunk, and its derivatives by log-prob and, if it depends on it, by entropy."""
    with torch.enable_grad():
        given = logprobs.detach().requires_grad_(), entropies.detach().requires_grad_()
        loss = objective(*given, part).sum()
        by_logprob, by_entropy = torch.autograd.grad(loss, given, allow_unused=True)
    return loss.detach(), torch.zeros_like(logprobs) if by_logprob is None else by_logprob, by_entropy
