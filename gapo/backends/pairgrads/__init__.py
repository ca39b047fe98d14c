"""What the engines of groups' gradients share, whatever the framework: it imports none."""
