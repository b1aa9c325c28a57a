"""Kills, damage, readers beside a writer and a full disk: what an index must come through, at any length."""
