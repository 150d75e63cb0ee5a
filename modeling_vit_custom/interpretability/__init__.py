"""What a trained model has learnt and what it looks at: pure functions of a model and normalised images.

They serve every architecture of the family, or say why they cannot, with any attention implementation, on any device,
and hold the attention weights of one block at a time. Where a model merges tokens, maps, distances and colours show
what it does without. `python -m modeling_vit_custom.interpretability` draws them.
Shapes: B images, C channels, (H, W) pixels, (h, w) grid of N patches, P prefix tokens, A heads, D width, L labels.
"""

from .attention import (
    AttentionDistance,
    attention_distance,
    attention_map,
    attention_rollout,
    gradient_attention,
    gradient_rollout,
    to_pixels,
    to_probabilities,
)
from .evidence import PatchScores, explain, grad_cam, leaves_map, score_map
from .features import feature_colors, image_features, nearest_images, predict_at_sizes
from .weights import has_positions, patch_filters, position_similarity, principal_filters


__all__ = [
    "AttentionDistance",
    "PatchScores",
    "attention_distance",
    "attention_map",
    "attention_rollout",
    "explain",
    "feature_colors",
    "grad_cam",
    "gradient_attention",
    "gradient_rollout",
    "has_positions",
    "image_features",
    "leaves_map",
    "nearest_images",
    "patch_filters",
    "position_similarity",
    "predict_at_sizes",
    "principal_filters",
    "score_map",
    "to_pixels",
    "to_probabilities",
]
