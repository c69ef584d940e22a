"""Sources of data: the embedded digits, CIFAR, folders, the Hugging Face hub and text files."""
