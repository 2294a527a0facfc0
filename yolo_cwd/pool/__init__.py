# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images that nobody has annotated, labelled by the teacher."""
