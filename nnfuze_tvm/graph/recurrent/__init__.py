"""Recurrent layers: the equations of their cells, said once for NumPy, for Relax and for loops; and the loops."""
