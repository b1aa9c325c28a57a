"""Weights: everybody's ViT checkpoints in (`load_checkpoint`), our own files in and out, and the way back to timm."""

from vitembed.weights.checkpoint import Checkpoint
from vitembed.weights.export import timm_arguments, timm_state
from vitembed.weights.load import load_checkpoint, saved_model_at
from vitembed.weights.shipped import SHIPPED, shipped_folder, shipped_verifier
from vitembed.weights.store import (
    fingerprint,
    is_ours,
    is_saved_model,
    load_state,
    load_weights,
    read_saved_model,
    save_weights,
)

__all__ = [
    "SHIPPED",
    "Checkpoint",
    "fingerprint",
    "is_ours",
    "is_saved_model",
    "load_checkpoint",
    "load_state",
    "load_weights",
    "read_saved_model",
    "save_weights",
    "saved_model_at",
    "shipped_folder",
    "shipped_verifier",
    "timm_arguments",
    "timm_state",
]
