"""What the pictures show, in words."""

TOP_ROW = (
    "Ground truth, and the detections of both networks in evaluation mode, coloured by class, with their scores. "
    "The thin white boxes further down are the ground truth again."
)
# The columns of maps: heading -> what it shows.
COLUMNS = {
    "teacher's map": "What matters to the teacher: its gradient map, scaled to [0, 1] at each level. Of GKD.IMPORTANCE "
    "channel it is the paper's map; otherwise the gradient of each element enters it.",
    "student's map": "What matters to the student: its gradient map, computed and scaled in the same way.",
    "difference": "The teacher's map minus the student's. Red: the teacher looks here, the student does not; blue: the "
    "other way round. Its mean absolute value, summed over the levels, is gkd's loss_gkd_gradient before its weight, "
    "with GKD.MAP_REGION image; with boxes, the square root of the mask weighs each cell.",
    "box context mask": "Where gkd's loss_bmfi_box compares features: in the objects, each cell of which weighs the "
    "more the smaller the object is, and fading in the context around them. Elsewhere the mask is 0 and not coloured.",
    "importance": "Only with GKD.IMPORTANCE norm and student: the norm of the gradient by which the imitation weighs "
    "the cells, the student's before alignment; in proportion to its largest value.",
}
SCORE = "score"
# The importances of a cell: name -> what it is.
IMPORTANCES = {
    "channel": "The paper's map of the teacher: features times the mean gradient of their channel, summed over the "
    "channels, rectified by GKD.RECTIFIER, scaled to [0, 1].",
    "element": "The same with the gradient of each element in place of the channel's mean.",
    "norm": "The norm over channels of the teacher's gradient.",
    "student": "The norm over channels of the gradient of the student's own losses, before alignment.",
    SCORE: "The teacher's score of the cell: for a RetinaNet, its largest class probability; for an FCOS, the root "
    "of that times the cell's centerness; for an R-CNN, which scores no class in a cell, the largest objectness of its "
    "RPN.",
}
