# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a run needs around the method: its request, its folder, its files, its state, and several processes."""
