"""The gradient of an embedding that is the vocabulary head too, without a second tensor of the vocabulary's size.

Autograd makes the head's gradient and the embedding's, each as large as the weights, and adds them up. The embedding's
holds as many rows as the batch has tokens; here they are added where the head's gradient already lies.
"""

from typing import Any

from torch import Tensor


def add_rows_in_place(model: Any) -> None:
    """Changes how the embedding's gradient is made from now on, if it is tied to the head and learns.

    Every backward pass has to go through the head.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = embedding.weight
    if head is None or head.weight is not weight or not weight.requires_grad:
        return

    def leaf(module: Any, given: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        if not rows.requires_grad:
            return rows

        def add(gradient: Tensor) -> None:
            ids = given[0]
            if embedding.padding_idx is not None:
                gradient = gradient.masked_fill((ids == embedding.padding_idx)[..., None], 0)
            # The head's gradient is there: it comes first, and autograd adds to a leaf at once.
            weight.grad.index_put_((ids.flatten(),), gradient.flatten(0, -2).to(weight.dtype), accumulate=True)

        rows = rows.detach().requires_grad_()
        rows.register_hook(add)
        return rows

    embedding.register_forward_hook(leaf)
