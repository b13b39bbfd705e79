"""One file a task: tensors -> answers, pure functions on arrays."""
