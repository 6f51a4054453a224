"""Memory of one call: in which order kernels run, what lies over what, and where in one piece of memory."""
