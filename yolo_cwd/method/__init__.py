# SPDX-License-Identifier: AGPL-3.0-or-later
"""What happens in a training step: teacher, pyramid, adapters, loss, and the trainer that puts them together."""
