# SPDX-License-Identifier: AGPL-3.0-or-later
"""The training step: teacher, pyramid, adapters, loss, and the trainer that puts them together."""
