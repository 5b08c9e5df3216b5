"""What is called: plugins for Holdfast, functions of the same work for its peers."""
