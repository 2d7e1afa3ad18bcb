"""The distiller: a student, its frozen teacher, and what pairs the two."""
