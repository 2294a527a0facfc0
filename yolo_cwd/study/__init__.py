# SPDX-License-Identifier: AGPL-3.0-or-later
"""What surrounds a training: a check before it, labels for a pool, comparisons of several, and a demonstration."""
