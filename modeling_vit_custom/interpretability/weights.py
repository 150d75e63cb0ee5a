"""What the weights of the first layers hold: filters and positions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling_vit_custom import PositionEmbedding, ViTCustomPreTrainedModel


def patch_filters(model: ViTCustomPreTrainedModel) -> Tensor:
    """The filters of the first patch embedding, (D, C, patch, patch)."""
    return model.base_model.stages[0].embedding.projection.weight.detach().float()


def principal_filters(model: ViTCustomPreTrainedModel, count: int = 28) -> tuple[Tensor, Tensor]:
    """Principal components of the patch filters, (count, C, patch, patch), and their shares of the variance (count,).

    ViT, https://arxiv.org/abs/2010.11929, figure 7 left. There may be fewer than asked for; signs mean nothing.
    """
    filters = patch_filters(model)
    flat = filters.flatten(1)
    _, scales, components = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    shares = scales.square() / scales.square().sum().clamp(min=1e-30)
    return components[:count].unflatten(1, filters.shape[1:]), shares[:count]


def has_positions(model: ViTCustomPreTrainedModel, stage: int = 0) -> bool:
    """Whether a stage has absolute positions."""
    return isinstance(model.base_model.stages[stage].position_embedding, PositionEmbedding)


def position_similarity(model: ViTCustomPreTrainedModel, stage: int = 0) -> Tensor:
    """Cosine similarity between the positions of a stage: (h, w, h, w), a tile (h, w) for each position.

    ViT, https://arxiv.org/abs/2010.11929, figure 7 centre.

    Raises:
        ValueError: if the stage has no absolute positions.
    """
    if not has_positions(model, stage):
        raise ValueError(f"stage {stage} has no absolute positions to compare (position_embedding_type='none')")
    embedding = model.base_model.stages[stage].position_embedding
    positions = F.normalize(embedding.weight.detach()[0].float(), dim=-1)
    return (positions @ positions.T).unflatten(1, embedding.grid_size).unflatten(0, embedding.grid_size)
