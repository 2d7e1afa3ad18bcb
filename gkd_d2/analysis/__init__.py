"""What looks at finished runs and at what a distillation costs. No training imports it.

Of runs: ``runs`` reads what they left, ``roles`` finds who is whose teacher and baseline, ``comparison`` and ``plots``
show them side by side, ``cost`` measures their detectors, and ``study`` trains and reports many of them. Of a
distiller: ``gradient_ratios`` proposes weights, ``dataset_images`` gives what both networks see in images,
``importance_maps`` and ``importance_report`` whether gradients point at the objects there, and ``benchmark`` times the
losses and the training step.
"""
