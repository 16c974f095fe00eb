/* The least that starting a program can cost: benches/startup.rs compares with it. */
int main(void) { return 0; }
