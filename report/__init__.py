"""What people look at: pages of curves and of training runs, figures, overlays."""
