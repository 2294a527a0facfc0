# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a run needs around the method: its request, folder, files and state, and support for several processes."""
