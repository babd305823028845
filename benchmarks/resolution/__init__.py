"""Quality of students against the size of the images: training at one size and at many, measured at all."""
