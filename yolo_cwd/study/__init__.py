# SPDX-License-Identifier: AGPL-3.0-or-later
"""What surrounds a training: a check before it, comparisons of several, and a demonstration."""
