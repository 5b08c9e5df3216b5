"""Here the package is wanted."""

import holdfast_no_such_package.kernels

iou = holdfast_no_such_package.kernels.iou
