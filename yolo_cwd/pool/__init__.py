# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images without labels, which the teacher labels."""
