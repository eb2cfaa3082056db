"""One module per vision data set: ``load(root)`` reads the layout that torchvision's class of that data set reads."""
