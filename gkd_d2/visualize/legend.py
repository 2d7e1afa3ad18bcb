"""What the pictures show, in words."""

TOP_ROW = (
    "Ground truth, and the detections of both networks in evaluation mode, coloured by class, with their scores. "
    "The thin white boxes further down are the ground truth again."
)
# The columns of maps: heading -> what it shows.
COLUMNS = {
    "teacher's map": "What matters to the teacher: its gradient map, scaled to [0, 1] at each level.",
    "student's map": "What matters to the student: its gradient map, scaled in the same way.",
    "difference": "The teacher's map minus the student's. Red: the teacher looks here, the student does not; blue: the "
    "other way round. Its mean absolute value, summed over the levels, is gkd's loss_gkd_gradient before its weight.",
    "box context mask": "Where gkd's loss_bmfi_box compares features: in the objects, each cell of which weighs the "
    "more the smaller the object is, and fading in the context around them. Elsewhere the mask is 0 and not coloured.",
}
