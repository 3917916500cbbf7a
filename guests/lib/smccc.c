/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "smccc.h"

#include "psci.h"

struct hvc_result hvc(uint64_t function, uint64_t x1, uint64_t x2, uint64_t x3)
{
	register uint64_t r0 asm("x0") = function;
	register uint64_t r1 asm("x1") = x1;
	register uint64_t r2 asm("x2") = x2;
	register uint64_t r3 asm("x3") = x3;

	asm volatile("hvc #0"
		     : "+r"(r0), "+r"(r1), "+r"(r2), "+r"(r3)
		     :
		     : "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14",
		       "x15", "x16", "x17", "memory");
	return (struct hvc_result){r0, r1, r2, r3};
}

struct hypervisor ask_hypervisor(void)
{
	struct hypervisor found = {0};
	struct hvc_result uid = hvc(SMCCC_VENDOR_UID, 0, 0, 0);

	found.smccc = (uint32_t)hvc(SMCCC_VERSION, 0, 0, 0).x0;
	found.psci = (uint32_t)hvc(PSCI_VERSION, 0, 0, 0).x0;
	/* 28b46fb6-2ec5-11e9-a9ca-4b564d003a74, four bytes a register. */
	found.is_kvm = (uint32_t)uid.x0 == 0xB66FB428 && (uint32_t)uid.x1 == 0xE911C52E &&
		       (uint32_t)uid.x2 == 0x564BCAA9 && (uint32_t)uid.x3 == 0x743A004D;
	if (!found.is_kvm)
		return found;
	found.protects = (hvc(KVM_FEATURES, 0, 0, 0).x0 & KVM_FEATURES_PROTECTED) ==
			 KVM_FEATURES_PROTECTED;
	if (found.protects)
		found.granule = hvc(KVM_HYP_MEMINFO, 0, 0, 0).x0;
	return found;
}

const char *smccc_words(int64_t code)
{
	switch (code) {
	case SMCCC_SUCCESS:
		return "success";
	case SMCCC_NOT_SUPPORTED:
		return "not supported";
	case SMCCC_NOT_REQUIRED:
		return "not required";
	case SMCCC_INVALID_PARAMETER:
		return "invalid parameter";
	default:
		return "unknown code";
	}
}
