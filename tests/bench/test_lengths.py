"""Token counts stand for the data that they are named after."""

from __future__ import annotations
