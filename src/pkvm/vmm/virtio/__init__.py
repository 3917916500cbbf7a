# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio 1.2 devices behind the virtio-mmio transport (version 2).

"section" in these modules is one of the OASIS specification "Virtual I/O Device
(VIRTIO) Version 1.2".
"""
