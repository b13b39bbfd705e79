"""One file a task: which head, which tensors, how an answer is made of them."""
