/* A QEMU plugin that counts the AArch64 instructions a program executes, per block of straight-line code.
 *
 * A block costs one addition each time it runs; what it consists of is read once, when QEMU translates it. The
 * program says what is counted: the system call MARK(0) sets all counters to zero, MARK(1) writes them to the file
 * given as out=FILE, a line per block: its address in hex, how often it ran, then what one run executes: instructions
 * in all, multiplications of the SIMD and floating-point unit, loads, stores. Counters are not atomic: one thread.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* QEMU's plugin interface, version 1, as far as it is used; distributions don't ship its header. */
typedef uint64_t Id;
typedef struct Block Block;
typedef struct Instruction Instruction;
enum { ADD_U64 };
extern void qemu_plugin_register_vcpu_tb_trans_cb(Id, void (*)(Id, Block *));
extern void qemu_plugin_register_vcpu_syscall_cb(Id, void (*)(Id, unsigned, int64_t, uint64_t, uint64_t, uint64_t,
                                                             uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));
extern void qemu_plugin_register_vcpu_tb_exec_inline(Block *, int, void *, uint64_t);
extern size_t qemu_plugin_tb_n_insns(const Block *);
extern Instruction *qemu_plugin_tb_get_insn(const Block *, size_t);
extern uint64_t qemu_plugin_tb_vaddr(const Block *);
extern const void *qemu_plugin_insn_data(const Instruction *);
__attribute__((visibility("default"))) int qemu_plugin_version = 1;

/* No system call has this number. */
#define MARK 28262

enum { OTHER, MULTIPLY, LOAD, STORE, CLASSES };

typedef struct Record {
    struct Record *next;
    uint64_t address, runs, instructions, of_class[CLASSES];
} Record;

static Record *records;
static const char *path;

#define BITS(high, low) (word >> (low) & ((1u << ((high) - (low) + 1)) - 1))

/* "Loads and Stores" of the Arm Architecture Reference Manual, C4.1. */
static int memory_class(uint32_t word)
{
    unsigned opc = BITS(23, 22);
    switch (BITS(29, 27)) {
    case 3:
        if (BITS(24, 24)) /* LDAPUR, STLUR */
            return opc ? LOAD : STORE;
        return BITS(26, 26) == 0 && BITS(31, 30) == 3 ? OTHER : LOAD; /* a literal; PRFM */
    case 7:
        if (BITS(25, 24) == 0 && BITS(21, 21) && BITS(11, 10) == 0) /* atomics */
            return LOAD;
        if (BITS(25, 24) == 0 && BITS(21, 21) && BITS(10, 10)) /* LDRAA */
            return LOAD;
        if (BITS(26, 26))
            return opc & 1 ? LOAD : STORE;
        if (BITS(31, 30) == 3 && opc == 2) /* PRFM */
            return OTHER;
        return opc ? LOAD : STORE;
    default: /* pairs, exclusives, structures of vectors */
        return opc & 1 ? LOAD : STORE;
    }
}

/* "Data Processing -- Scalar Floating-Point and Advanced SIMD", same place. */
static int multiplies(uint32_t word)
{
    unsigned u = BITS(29, 29), by_bit_10 = BITS(10, 10);
    if (BITS(31, 24) == 0x1f) /* FMADD, FMSUB, ... */
        return 1;
    if (BITS(31, 24) == 0x1e) /* FMUL, FNMUL */
        return BITS(21, 21) && BITS(11, 10) == 2 && BITS(14, 12) == 0;
    if (BITS(31, 31))
        return 0;
    if (BITS(27, 24) == 15) /* by element */
        return !by_bit_10;
    if (BITS(27, 24) != 14)
        return 0;
    if (BITS(21, 21) && by_bit_10) { /* three vectors of one type */
        unsigned opcode = BITS(15, 11);
        return opcode == 0x12 || opcode == 0x13 || opcode == 0x16 /* MLA, MUL, SQDMULH */
               || opcode == 0x19 || opcode == 0x1b                /* FMLA, FMUL */
               || (opcode == 0x1d && !u);                         /* FMLAL */
    }
    if (BITS(21, 21)) /* three vectors, the result of another type: SMLAL, SMULL, ... */
        return BITS(11, 10) == 0 && BITS(15, 15) && BITS(14, 12) != 7;
    if (!by_bit_10 || !BITS(15, 15)) /* float16: FMLA, FMUL */
        return by_bit_10 && BITS(22, 22) && (BITS(15, 11) == 1 || BITS(15, 11) == 3);
    return BITS(14, 11) != 12 && BITS(14, 11) != 14; /* dot and matrix products, all but FCADD */
}

static int class_of(uint32_t word)
{
    if (BITS(28, 25) == 2) /* SVE: its multiplications are not told apart */
        return BITS(31, 29) == 7 ? STORE : BITS(31, 31) ? LOAD : OTHER;
    if (BITS(27, 27) && !BITS(25, 25))
        return memory_class(word);
    return BITS(27, 25) == 7 && multiplies(word) ? MULTIPLY : OTHER;
}

static void translated(Id id, Block *block)
{
    Record *record = calloc(1, sizeof *record);
    record->address = qemu_plugin_tb_vaddr(block);
    record->instructions = qemu_plugin_tb_n_insns(block);
    for (size_t n = 0; n < record->instructions; n++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, n)), sizeof word);
        record->of_class[class_of(word)]++;
    }
    record->next = records;
    records = record;
    qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &record->runs, 1);
}

static void called(Id id, unsigned cpu, int64_t number, uint64_t what, uint64_t b, uint64_t c, uint64_t d, uint64_t e,
                   uint64_t f, uint64_t g, uint64_t h)
{
    if (number != MARK)
        return;
    FILE *file = what ? fopen(path, "w") : NULL;
    for (Record *r = records; r; r = r->next) {
        if (file && r->runs)
            fprintf(file, "%" PRIx64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", r->address,
                    r->runs, r->instructions, r->of_class[MULTIPLY], r->of_class[LOAD], r->of_class[STORE]);
        else
            r->runs = 0;
    }
    if (file)
        fclose(file);
}

__attribute__((visibility("default"))) int qemu_plugin_install(Id id, const void *info, int argc, char **argv)
{
    for (int n = 0; n < argc; n++)
        if (!strncmp(argv[n], "out=", 4))
            path = strdup(argv[n] + 4);
    if (!path) {
        fprintf(stderr, "count: give out=FILE\n");
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
