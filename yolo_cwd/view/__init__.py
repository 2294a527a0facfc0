# SPDX-License-Identifier: AGPL-3.0-or-later
"""What people look at during a training and after it: sentences and pictures."""
