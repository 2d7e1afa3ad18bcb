"""Pictures of gradient maps, masks and detections: what is drawn, and how."""
