"""Weights: everybody's ViT checkpoints in (`load_checkpoint`), our own files in and out, and the way back to timm."""

from vitembed.weights.checkpoint import Checkpoint
from vitembed.weights.export import timm_arguments, timm_state
from vitembed.weights.load import load_checkpoint
from vitembed.weights.sources import resolve
from vitembed.weights.store import fingerprint, is_ours, load_state, load_weights, save_weights

__all__ = [
    "Checkpoint",
    "fingerprint",
    "is_ours",
    "load_checkpoint",
    "load_state",
    "load_weights",
    "resolve",
    "save_weights",
    "timm_arguments",
    "timm_state",
]
