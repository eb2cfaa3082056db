"""The study of scale (protocol B): model size, base quality, number of experts and method, held in and held out."""
